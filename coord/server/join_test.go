package server

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"overlay/coord"
	"overlay/coord/trust"
)

func TestFoundAndJoin(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	prefix := o.config.Prefix4
	if c := o.cert(t); c.IP4 != prefix.Addr().Next() || c.Name != "anna" {
		t.Errorf("owner is %s %v", c.Name, c.IP4)
	}
	b := o.joined(t, "bob")
	if c := b.cert(t); c.IP4 != prefix.Addr().Next().Next() || c.Name != "bob" {
		t.Errorf("second is %s %v", c.Name, c.IP4)
	}
	c := o.joined(t, "bob")
	if name := c.cert(t).Name; name != "bob-2" {
		t.Errorf("third is %s", name)
	}
	list, err := b.dial(t, o.server).Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names, by []string
	for _, n := range list.Nodes {
		names, by = append(names, n.Name), append(by, n.InvitedBy)
		if n.IP6 == b.cert(t).IP6 && n.WireGuard != b.cert(t).WireGuard {
			t.Error("addresses and keys are mixed up")
		}
	}
	if !slices.Equal(names, []string{"anna", "bob", "bob-2"}) || !slices.Equal(by, []string{"the owner invite", "anna", "anna"}) {
		t.Error(names, by)
	}
}

// A relay joins by an invite with its tag. Another invite is not spent on it.
func TestJoinAsRelay(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	r, plain := newNode(t), o.invite(t, nil)
	asRelay := func(i coord.Invite) (err error) {
		r.member, err = coord.Join(t.Context(), coord.JoinConfig{
			Invite: i, Device: r.device, WireGuard: r.wireguard, Name: "relay-1", Role: trust.RoleRelay,
		}, nil)
		return err
	}
	wantCode(t, asRelay(plain), coord.CodeNotRelay)
	if err := newNode(t).join(t, plain, "bob"); err != nil {
		t.Error("the invite was spent:", err)
	}
	tagged := o.invite(t, func(c *trust.InviteCap) { c.Uses, c.Tags = 2, []string{trust.RelayTag} })
	if err := asRelay(tagged); err != nil {
		t.Fatal(err)
	}
	cert := r.member.Cert
	wantCode(t, r.join(t, tagged, "relay-1"), coord.CodeBadRequest)     // it cannot be a node as well
	wantCode(t, newNode(t).join(t, tagged, "carl"), coord.CodeNotRelay) // it admits nothing else
	list, err := o.dial(t, o.server).Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	roles := map[string]string{}
	for _, n := range list.Nodes {
		roles[n.Name] = n.Role
	}
	if want := map[string]string{"anna": "node", "bob": "node", "relay-1": "relay"}; !maps.Equal(roles, want) {
		t.Errorf("roles %v", roles)
	}
	_, netmap := o.follow(t, o.server, "")
	for _, n := range netmap.Netmap.Nodes {
		if n.Device == public(r.device) && bytes.Equal(n.Cert, cert) {
			return
		}
	}
	t.Error("the relay is not in the netmap")
}

func TestRepeatGivesTheSame(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	again, err := coord.Join(t.Context(), o.config, nil)
	if err != nil || again.Cert.Hash() != o.member.Cert.Hash() {
		t.Error("the owner's repeat:", err)
	}
	i := o.invite(t, nil)
	b := newNode(t)
	if err := b.join(t, i, "bob"); err != nil {
		t.Fatal(err)
	}
	first := b.member.Cert.Hash()
	if err := b.join(t, i, "another-wish"); err != nil || b.member.Cert.Hash() != first {
		t.Error("the member's repeat:", err)
	}
	invites, err := o.dial(t, o.server).Invites(t.Context())
	if err != nil || len(invites.Invites) != 2 || !slices.Equal(invites.Invites[0].Used, []string{"bob"}) {
		t.Errorf("%+v, %v", invites, err)
	}
}

func TestOwnerInviteWorksOnce(t *testing.T) {
	s := start(t, t.TempDir())
	found(t, s)
	invite, _ := s.OwnerInvite()
	thief := newOwner(t, invite)
	_, err := coord.Join(t.Context(), thief.config, nil)
	wantCode(t, err, coord.CodeInviteUsed)
	if !strings.Contains(err.Error(), `already used by "anna"`) {
		t.Error(err)
	}
}

// A start without an owner voids the invite that the last one printed.
func TestOwnerInviteIsVoidedByRestart(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir)
	old, _ := s.OwnerInvite()
	s.stop()
	s = start(t, dir)
	fresh, _ := s.OwnerInvite()
	old.Server = fresh.Server // the port is another one
	if old.Hash != fresh.Hash {
		t.Fatal("the server's key did not survive the restart")
	}
	_, err := coord.Join(t.Context(), newOwner(t, old).config, nil)
	wantCode(t, err, coord.CodeInviteUnknown)
	found(t, s)
}

// One of 100 devices gets a single-use invite, whatever the timing, and can
// repeat its request.
func TestSingleUseInviteRedeemedInParallel(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	i := o.invite(t, nil)
	const n = 100
	nodes, errs := make([]*node, n), make([]error, n)
	var wg sync.WaitGroup
	for k := range n {
		nodes[k] = newNode(t)
		wg.Go(func() { errs[k] = redeem(t, s.Server, nodes[k], i) })
	}
	wg.Wait()
	var winners []*node
	for k, err := range errs {
		if err == nil {
			winners = append(winners, nodes[k])
			continue
		}
		wantCode(t, err, coord.CodeInviteUsed)
	}
	if len(winners) != 1 {
		t.Fatalf("%d devices won", len(winners))
	}
	if err := winners[0].join(t, i, "again"); err != nil {
		t.Error("the winner's repeat:", err)
	}
	if list, err := o.dial(t, o.server).Nodes(t.Context()); err != nil || len(list.Nodes) != 2 {
		t.Errorf("%d nodes, %v", len(list.Nodes), err)
	}
}

// redeem joins below the limit on failures, which would end the race early.
func redeem(t testing.TB, s *Server, n *node, i coord.Invite) error {
	reply, err := s.registry.reserve(t.Context(), applicantOf(n, i, "racer"))
	if err != nil {
		return err
	}
	_, err = s.registry.commit(t.Context(), public(n.device), certFor(t, s, n, i, reply))
	return err
}

func applicantOf(n *node, i coord.Invite, name string) applicant {
	return applicant{device: public(n.device), invite: public(i.Key()), wireguard: wireguardOf(n), name: name}
}

// Fifty devices of one network join at once: what succeeds is never limited.
func TestParallelJoinsAreNotLimited(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	const n = 50
	i := o.invite(t, uses(n))
	var wg sync.WaitGroup
	nodes := make([]*node, n)
	for k := range n {
		nodes[k] = newNode(t)
		wg.Go(func() {
			if err := nodes[k].join(t, i, "laptop"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	names, addresses := map[string]bool{}, map[string]bool{}
	for _, n := range nodes {
		c := n.cert(t)
		names[c.Name], addresses[c.IP4.String()] = true, true
	}
	if len(names) != n || len(addresses) != n {
		t.Errorf("%d names and %d addresses for %d devices", len(names), len(addresses), n)
	}
}

func TestFailuresAreLimited(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	i, _ := o.capability(t, o.signer, nil) // the server never heard of it
	n := newNode(t)
	conn := n.dial(t, o.server)
	hello, err := conn.Hello(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	proofs, err := conn.Prove(hello, i.Key(), n.device, n.wireguard)
	if err != nil {
		t.Fatal(err)
	}
	q := coord.JoinRequest{Invite: public(i.Key()), WireGuard: wireguardOf(n), Name: "x", Proofs: proofs}
	for range failuresPerSource {
		_, err := conn.Join(t.Context(), q)
		wantCode(t, err, coord.CodeInviteUnknown)
	}
	_, err = conn.Join(t.Context(), q)
	wantCode(t, err, coord.CodeRateLimited)
	var e *coord.Error
	if e = asError(err, s.log); e.RetryAfter <= 0 {
		t.Error("no Retry-After")
	}
}

func TestJoinRefusals(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	now := time.Now().Truncate(time.Second)
	clock := now
	s.registry.now = func() time.Time { return clock }
	single := o.invite(t, nil)
	forced := o.invite(t, func(c *trust.InviteCap) { c.NotAfter, c.Name = now.Add(24*time.Hour), "bob" })
	o2 := newNode(t)
	if err := o2.join(t, single, "bob"); err != nil {
		t.Fatal(err)
	}
	withdrawn := o.invite(t, nil)
	if err := o.dial(t, o.server).Revoke(t.Context(), o.revocation(t, public(withdrawn.Key()), o.signer)); err != nil {
		t.Fatal(err)
	}
	short := o.invite(t, func(c *trust.InviteCap) { c.NotAfter = now.Add(time.Minute) })
	clock = now.Add(3*time.Hour + time.Minute)
	open := o.invite(t, func(c *trust.InviteCap) { c.NotAfter = now.Add(24 * time.Hour) })
	for _, c := range []struct {
		name string
		a    applicant
		code coord.Code
		text string
	}{
		{"used", applicantOf(newNode(t), single, "eve"), coord.CodeInviteUsed, `already used by "bob" on ` + now.UTC().Format("2006-01-02")},
		{"withdrawn", applicantOf(newNode(t), withdrawn, "eve"), coord.CodeInviteWithdrawn, "withdrawn by anna"},
		{"expired", applicantOf(newNode(t), short, "eve"), coord.CodeInviteExpired, "expired 3 h ago (" + now.Add(time.Minute).UTC().Format(timeLayout) + ")"},
		{"name", applicantOf(newNode(t), open, "Büro PC"), coord.CodeBadRequest, "not usable"},
		{"forced name", applicantOf(newNode(t), forced, "eve"), coord.CodeNameTaken, `name "bob" is taken by ` + o2.cert(t).IP4.String() + " (offline)"},
		{"own key again", applicant{device: public(newNode(t).device), invite: public(open.Key()), wireguard: wireguardOf(o2), name: "eve"}, coord.CodeBadKey, "belongs to another"},
		{"member again", applicantOf(o2, open, "eve"), coord.CodeBadRequest, `already a member as "bob"`},
	} {
		_, err := s.registry.reserve(t.Context(), c.a)
		if codeOf(err) != c.code || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v (%s); want %s with %q", c.name, err, codeOf(err), c.code, c.text)
		}
	}
	refused := applicantOf(newNode(t), forced, "eve")
	refused.exact = true
	if _, err := s.registry.reserve(t.Context(), refused); codeOf(err) != coord.CodeBadRequest || !strings.Contains(err.Error(), `for the name "bob", not for "eve"`) {
		t.Error("forced name, another wish:", err)
	}
	_, err := s.registry.reserve(t.Context(), applicantOf(newNode(t), forced, "eve"))
	wantHint(t, err, "this invite is for that name alone: ask for another invite")
	exact := applicantOf(newNode(t), open, "bob")
	exact.exact = true
	_, err = s.registry.reserve(t.Context(), exact)
	wantCode(t, err, coord.CodeNameTaken)
	wantHint(t, err, "use --name with another one")
	if n, err := s.registry.nodes(t.Context(), public(o.device)); err != nil || len(n) != 2 {
		t.Errorf("refused requests left %d nodes, %v", len(n), err)
	}
}

func wantHint(t *testing.T, err error, want string) {
	t.Helper()
	if e, ok := errors.AsType[*coord.Error](err); !ok || e.Hint != want {
		t.Errorf("got %#v, want the hint %q", err, want)
	}
}

// An invite for a name that somebody has would admit nobody.
func TestInviteForATakenName(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	bob := o.joined(t, "bob")
	clock := time.Now()
	s.registry.now = func() time.Time { return clock }
	named := func(c *trust.InviteCap) { c.NotAfter, c.Name = clock.Add(time.Hour), "bob" }
	ask := func() error {
		_, doc := o.capability(t, o.signer, named)
		return o.dial(t, o.server).Invite(t.Context(), coord.InviteRequest{Cap: doc})
	}
	err := ask()
	wantCode(t, err, coord.CodeNameTaken)
	wantHint(t, err, "use --name with another one")
	if err := bob.dial(t, o.server).Revoke(t.Context(), bob.revocation(t, public(bob.device), bob.device)); err != nil {
		t.Fatal(err)
	}
	if err = ask(); codeOf(err) != coord.CodeNameTaken || !strings.Contains(err.Error(), "left; free again on ") {
		t.Errorf("of one who left: %v", err)
	}
	clock = clock.Add(quarantine + time.Minute)
	if err := ask(); err != nil {
		t.Errorf("a day later: %v", err)
	}
}

// Who may not see the invites is told who may.
func TestInvitesOfAnotherMachine(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	_, err := o.joined(t, "bob").dial(t, o.server).Invites(t.Context())
	wantCode(t, err, coord.CodeNotSigner)
	wantHint(t, err, "On anna run: overlay invites")
}

func TestWhoMayDoWhat(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	b := o.joined(t, "bob")
	stranger := newNode(t)
	_, ours := o.capability(t, o.signer, nil)
	_, forged := o.capability(t, newKey(t), nil)
	ctx := t.Context()
	for name, c := range map[string]struct {
		err  error
		want coord.Code
	}{
		"stranger lists nodes":    {second(stranger.dial(t, o.server).Nodes(ctx)), coord.CodeNotMember},
		"stranger lists invites":  {second(stranger.dial(t, o.server).Invites(ctx)), coord.CodeNotMember},
		"stranger opens a stream": {second(stranger.dial(t, o.server).Stream(ctx, "")), coord.CodeNotMember},
		"stranger invites":        {stranger.dial(t, o.server).Invite(ctx, coord.InviteRequest{Cap: ours}), coord.CodeNotMember},
		"stranger certifies":      {second(stranger.dial(t, o.server).Cert(ctx, coord.CertRequest{Cert: b.member.Cert})), coord.CodeBadRequest},
		"member lists invites":    {second(b.dial(t, o.server).Invites(ctx)), coord.CodeNotSigner},
		"forged signer":           {b.dial(t, o.server).Invite(ctx, coord.InviteRequest{Cap: forged}), coord.CodeNotSigner},
		"member revokes another":  {b.dial(t, o.server).Revoke(ctx, b.revocation(t, public(o.device), b.device)), coord.CodeNotSigner},
		"member revokes for another": {
			o.dial(t, o.server).Revoke(ctx, b.revocation(t, public(b.device), b.device)), coord.CodeNotSigner,
		},
		"signer's words by a member": {b.dial(t, o.server).Invite(ctx, coord.InviteRequest{Cap: ours}), ""},
	} {
		if codeOf(c.err) != c.want || (c.err == nil) != (c.want == "") {
			t.Errorf("%s: %v, want %q", name, c.err, c.want)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// What a device held is free a day after it left, not before, and its key
// never comes back.
func TestLeaving(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	clock := time.Now()
	s.registry.now = func() time.Time { return clock }
	b := o.joined(t, "bob")
	ip := b.cert(t).IP4
	conn := b.dial(t, o.server)
	for range 2 { // also when the first answer was lost
		if err := conn.Revoke(t.Context(), b.revocation(t, public(b.device), b.device)); err != nil {
			t.Fatal(err)
		}
	}
	_, err := conn.Nodes(t.Context())
	wantCode(t, err, coord.CodeRevoked)

	i := o.invite(t, func(c *trust.InviteCap) { c.Uses, c.NotAfter = 9, clock.Add(100*time.Hour) })
	reply, err := s.registry.reserve(t.Context(), applicantOf(newNode(t), i, "bob"))
	if err != nil || reply.Name != "bob-2" || reply.IP4 == ip {
		t.Fatalf("at once: %+v, %v", reply, err)
	}
	_, err = s.registry.reserve(t.Context(), applicantOf(b, i, "bob"))
	wantCode(t, err, coord.CodeRevoked)
	clock = clock.Add(quarantine - time.Minute)
	if reply, err = s.registry.reserve(t.Context(), applicantOf(newNode(t), i, "bob")); err != nil || reply.IP4 == ip || reply.Name == "bob" {
		t.Fatalf("before a day: %+v, %v", reply, err)
	}
	clock = clock.Add(2 * time.Minute)
	if reply, err = s.registry.reserve(t.Context(), applicantOf(newNode(t), i, "bob")); err != nil || reply.IP4 != ip || reply.Name != "bob" {
		t.Fatalf("after a day: %+v, %v", reply, err)
	}
}

// A reservation that nobody finishes costs the invite nothing.
func TestReservationExpires(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	clock := time.Now()
	s.registry.now = func() time.Time { return clock }
	i := o.invite(t, nil)
	a := applicantOf(newNode(t), i, "bob")
	first, err := s.registry.reserve(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	late := newNode(t)
	_, err = s.registry.reserve(t.Context(), applicantOf(late, i, "bob"))
	wantCode(t, err, coord.CodeInviteUsed)
	clock = clock.Add(reservationTime + time.Second)
	reply, err := s.registry.reserve(t.Context(), applicantOf(late, i, "bob"))
	if err != nil || reply.IP4 != first.IP4 || reply.Name != "bob" {
		t.Fatalf("%+v, %v", reply, err)
	}
	_, err = s.registry.commit(t.Context(), a.device, certFor(t, s.Server, late, i, reply))
	wantCode(t, err, coord.CodeNotMember)
	if _, err := s.registry.commit(t.Context(), public(late.device), certFor(t, s.Server, late, i, reply)); err != nil {
		t.Fatal(err)
	}
	clock = clock.Add(reservationTime + time.Second)
	if err := s.registry.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n, err := s.registry.nodes(t.Context(), public(late.device)); err != nil || len(n) != 2 {
		t.Errorf("the sweep took a member: %v, %v", n, err)
	}
}

// A device that begins again with a new WireGuard key or invite does not keep
// two places.
func TestStartOver(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	i, j := o.invite(t, nil), o.invite(t, nil)
	n := newNode(t)
	first, err := s.registry.reserve(t.Context(), applicantOf(n, i, "bob"))
	if err != nil {
		t.Fatal(err)
	}
	n.wireguard = newNode(t).wireguard
	for _, invite := range []coord.Invite{i, j} {
		reply, err := s.registry.reserve(t.Context(), applicantOf(n, invite, "bob"))
		if err != nil || reply.IP4 != first.IP4 || reply.Name != "bob" {
			t.Fatalf("%+v, %v", reply, err)
		}
	}
	if err := newNode(t).join(t, i, "carl"); err != nil {
		t.Error("the invite given up is not free:", err)
	}
}

// Who tries again under another name gets it, unless he is a member already.
func TestAnotherNameAtTheSecondTry(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	n := newNode(t)
	a := applicantOf(n, o.invite(t, nil), "bob")
	if _, err := s.registry.reserve(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	a.name, a.exact = "carl", true
	if reply, err := s.registry.reserve(t.Context(), a); err != nil || reply.Name != "carl" {
		t.Fatalf("%+v, %v", reply, err)
	}
	b := o.joined(t, "bob")
	a = applicant{device: public(b.device), invite: b.cert(t).Invite, wireguard: wireguardOf(b), name: "dora", exact: true}
	_, err := s.registry.reserve(t.Context(), a)
	if codeOf(err) != coord.CodeBadRequest || !strings.Contains(err.Error(), `already a member as "bob"`) {
		t.Error(err)
	}
}

// An invite that the server would refuse to everybody is refused to its maker.
func TestInviteByAWrongClock(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	for name, shift := range map[string]time.Duration{"ahead": 24 * time.Hour, "behind": -24 * time.Hour} {
		_, doc := o.capability(t, o.signer, func(c *trust.InviteCap) {
			c.NotBefore, c.NotAfter = c.NotBefore.Add(shift), c.NotAfter.Add(shift)
		})
		err := o.dial(t, o.server).Invite(t.Context(), coord.InviteRequest{Cap: doc})
		if codeOf(err) != coord.CodeBadRequest || !strings.Contains(err.Error(), "the coordinator's clock says") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if list, err := o.dial(t, o.server).Invites(t.Context()); err != nil || len(list.Invites) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
}

// What is certified must be what was reserved.
func TestCertMustMatch(t *testing.T) {
	s := start(t, t.TempDir())
	o := found(t, s)
	for name, change := range map[string]func(*trust.NodeCert){
		"name":      func(c *trust.NodeCert) { c.Name = "root" },
		"address":   func(c *trust.NodeCert) { c.IP4 = o.cert(t).IP4 },
		"wireguard": func(c *trust.NodeCert) { c.WireGuard = o.cert(t).WireGuard },
		"ip6":       func(c *trust.NodeCert) { c.IP6 = o.cert(t).IP6 },
		"tags":      func(c *trust.NodeCert) { c.Tags = []string{"admin"} },
		"role":      func(c *trust.NodeCert) { c.Role = trust.RoleRelay },
	} {
		n, i := newNode(t), o.invite(t, nil)
		reply, err := s.registry.reserve(t.Context(), applicantOf(n, i, "bob"))
		if err != nil {
			t.Fatal(err)
		}
		c := nodeCert(t, s.Server, n, i, reply)
		change(&c)
		doc, err := trust.SignNodeCert(c, i.Key(), n.device)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = s.registry.commit(t.Context(), public(n.device), doc); codeOf(err) != coord.CodeBadRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
}
