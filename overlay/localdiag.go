package overlay

import "net/http"

func (n *Node) handleWhy(w http.ResponseWriter, r *http.Request) {
	n.with(w, func(s *session) (any, error) {
		var q pingRequest
		if err := read(r, &q); err != nil {
			return nil, err
		}
		return s.why(q.Peer, isRoot(r))
	})
}

func (n *Node) handleNetcheck(w http.ResponseWriter, r *http.Request) {
	n.with(w, func(s *session) (any, error) {
		var q NetcheckRequest
		if err := read(r, &q); err != nil {
			return nil, err
		}
		if q.Lifetime && !isRoot(r) {
			return nil, fail(Permission, "run it with sudo", "only root may have mappings measured for minutes")
		}
		return s.netcheck(r.Context(), q, isRoot(r))
	})
}
