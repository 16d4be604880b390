package overlay

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"slices"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
)

// Limits and defaults of an invite.
const (
	DefaultInviteLife = 24 * time.Hour
	MinInviteLife     = time.Minute
	MaxInviteLife     = 720 * time.Hour
	MaxInviteUses     = 1000
)

// requestWait bounds one request to the server for a person who waits.
const requestWait = 10 * time.Second

// Check refuses what no invite may be; its error is for people.
func (r InviteRequest) Check() error {
	if r.Uses < 0 || r.Uses > MaxInviteUses {
		return fail(Usage, fmt.Sprintf("use a number from 1 to %d", MaxInviteUses), "--uses %d is out of range", r.Uses)
	}
	if r.Expires != 0 && (r.Expires < MinInviteLife || r.Expires > MaxInviteLife) {
		return fail(Usage, "use 1m to 720h, for example 24h", "--expires %s is out of range", r.Expires)
	}
	if r.Name != "" && trust.ValidName(r.Name) != nil {
		return fail(Usage, "try --name "+trust.NormalizeName(r.Name),
			"name %q is not usable: letters a-z, digits and \"-\", at most 63", r.Name)
	}
	for _, t := range r.Tags {
		if trust.ValidName(t) != nil {
			return fail(Usage, "try --tag "+trust.NormalizeName(t), "tag %q is not usable: letters a-z, digits and \"-\", at most 63", t)
		}
	}
	if len(r.Tags) > trust.MaxTags {
		return fail(Usage, fmt.Sprintf("use at most %d tags", trust.MaxTags), "%d tags are too many", len(r.Tags))
	}
	if r.Name != "" && r.Uses > 1 {
		return fail(Usage, "leave out --name or --uses", "an invite with a fixed name works once")
	}
	return nil
}

// invite signs a new invite and hands its public half to the server.
func (s *session) invite(ctx context.Context, r InviteRequest) (InviteReply, error) {
	if err := r.Check(); err != nil {
		return InviteReply{}, err
	}
	if !s.signs() {
		return InviteReply{}, fail(Refused, "run it on the machine that founded the mesh", "this machine may not invite: it holds no signer key")
	}
	inv, err := coord.NewInvite(coord.InviteMember, s.hash, s.control.servers()[0])
	if err != nil {
		return InviteReply{}, err
	}
	c := capFor(r, inv, s.keys.Signer, time.Now())
	doc, err := trust.SignInviteCap(c, s.keys.Signer)
	if err != nil {
		return InviteReply{}, fmt.Errorf("sign the invite: %w", err)
	}
	err = s.ask(ctx, func(ctx context.Context, conn *coord.Conn) error {
		return conn.Invite(ctx, coord.InviteRequest{Cap: doc})
	})
	return InviteReply{Invite: inv.String(), Expires: c.NotAfter, Uses: int(c.Uses)}, err
}

// signs says whether this machine holds a signer's key of this mesh. One that
// once tried to found another mesh holds a key that signs nothing here.
func (s *session) signs() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	mesh := s.roster.mesh
	signers := append([]trust.Key{mesh.Genesis().Signer}, mesh.State().Signers...)
	return len(s.keys.Signer) == ed25519.PrivateKeySize && slices.Contains(signers, publicOf(s.keys.Signer))
}

// clockSlack lets an invite begin before this clock's now, because the server
// judges by its own.
const clockSlack = 10 * time.Minute

func capFor(r InviteRequest, inv coord.Invite, signer ed25519.PrivateKey, now time.Time) trust.InviteCap {
	now = now.UTC().Truncate(time.Second)
	life := r.Expires
	if life == 0 {
		life = DefaultInviteLife
	}
	return trust.InviteCap{
		Invite:    publicOf(inv.Key()),
		Signer:    publicOf(signer),
		NotBefore: now.Add(-clockSlack),
		NotAfter:  now.Add(life),
		Uses:      uint16(max(r.Uses, 1)),
		Name:      r.Name,
		Tags:      slices.Compact(slices.Sorted(slices.Values(r.Tags))),
	}
}

func publicOf(k ed25519.PrivateKey) trust.Key { return trust.Key(k.Public().(ed25519.PublicKey)) }

// ask makes one request to the server on a connection of its own.
func (s *session) ask(ctx context.Context, do func(context.Context, *coord.Conn) error) error {
	ctx, cancel := context.WithTimeout(ctx, requestWait)
	defer cancel()
	err := s.control.once(ctx, do)
	if err != nil {
		return serverError(err, s.control.servers()[0])
	}
	return nil
}

// invites lists the invites, for a signer.
func (s *session) invites(ctx context.Context) (list coord.InviteList, err error) {
	err = s.ask(ctx, func(ctx context.Context, c *coord.Conn) error {
		list, err = c.Invites(ctx)
		return err
	})
	return list, err
}

// nodes lists all members as the server sees them.
func (s *session) nodes(ctx context.Context) (list coord.NodeList, err error) {
	err = s.ask(ctx, func(ctx context.Context, c *coord.Conn) error {
		list, err = c.Nodes(ctx)
		return err
	})
	return list, err
}
