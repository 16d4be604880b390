package scripts

import (
	"go/token"
	"strings"
	"testing"
)

// TestLawsFind breaks every law on purpose: a law that finds nothing proves
// nothing.
func TestLawsFind(t *testing.T) {
	long := "package p\n" + strings.Repeat("\n", maxFileLines)
	longFunc := "package p\nfunc f() {\n" + strings.Repeat("\n", maxFuncLines) + "}\n"
	tests := []struct {
		law, file, text string
		want            string // part of the finding, line included; empty: none
	}{
		{"imports", "punch/a.go", "package punch\nimport \"overlay/coord\"\n", "punch/a.go:2: punch may not import our coord"},
		{"imports", "punch/a.go", "package punch\nimport \"net\"\n", ":2: punch may not import net:"},
		{"imports", "punch/a.go", "package punch\nimport \"net/netip\"\n", ""},
		{"imports", "punch/a.go", "package punch\nimport \"golang.org/x/sys/unix\"\n", "may not import golang.org/x/sys/unix"},
		{"imports", "tun/a.go", "package tun\nimport \"golang.org/x/sys/unix\"\n", ""},
		{"imports", "tun/a.go", "package tun\nimport \"golang.org/x/system\"\n", "may not import golang.org/x/system"},
		{"imports", "tun/a.go", "package tun\nimport \"log\"\n", "take a *slog.Logger"},
		{"imports", "tun/a.go", "package tun\nimport \"C\"\n", "cgo is not used"},
		{"imports", "attic/a.go", "package attic\n", "attic/a.go:1: no room of this name"},
		{"imports", "overlay/a.go", "package overlay\nimport \"overlay/coord\"\n", ""},
		{"imports", "overlay/a.go", "package overlay\nimport \"overlay/coord/server\"\n", "may not import our coord/server"},
		{"imports", "scripts/natlab/a.go", "package natlab\nimport \"overlay/tun\"\n", ""},
		{"stun codec", "punch/a.go", "package punch\nimport \"github.com/pion/stun/v2\"\nvar _ = stun.DialURI\n", ":3: stun.DialURI is not of the codec"},
		{"stun codec", "punch/a.go", "package punch\nimport s \"github.com/pion/stun/v2\"\nvar _ s.Client\n", ":3: stun.Client is not of the codec"},
		{"stun codec", "punch/a.go", "package punch\nimport \"github.com/pion/stun/v2\"\nvar _ stun.Message\n", ""},
		{"sockets", "coord/trust/a.go", "package trust\nimport \"net\"\nvar _ = net.ListenUDP\n", ":3: net.ListenUDP: coord/trust opens no socket"},
		{"sockets", "coord/trust/a.go", "package trust\nimport \"net\"\nvar _ = net.JoinHostPort\n", ""},
		{"sockets", "tun/a.go", "package tun\nimport \"net\"\nvar _ = net.ListenUDP\n", ""},
		{"doc comments", "tun/a.go", "package tun\n\nfunc F() {}\n", ":3: F has no comment"},
		{"doc comments", "tun/a.go", "package tun\ntype t struct{}\nfunc (t) F() {}\n", ""},
		{"doc comments", "tun/a.go", "package tun\n// T is.\ntype T[A any] struct{}\nfunc (*T[A]) F() {}\n", ":4: F has no comment"},
		{"doc comments", "tun/a.go", "package tun\n// Block.\ntype (\n\tT int\n)\n", ":4: T has no comment"},
		{"doc comments", "tun/a.go", "package tun\nconst A, B = 1, 2\n", ":2: A has no comment"},
		{"doc comments", "tun/a.go", "package tun\n// Kinds.\nconst (\n\tA = 1\n)\n", ""},
		{"doc comments", "scripts/natlab/a.go", "package natlab\nfunc F() {}\n", ""},
		{"lengths", "tun/a.go", long, "tun/a.go:1: the file has 501 lines"},
		{"lengths", "tun/a.go", long[:len(long)-1], ""},
		{"lengths", "tun/a.go", longFunc, ":2: f has 62 lines"},
		{"init", "tun/a.go", "package tun\nfunc init() {}\n", ":2: init()"},
		{"init", "tun/a.go", "package tun\nfunc (t) init() {}\n", ""},
		{"globals", "tun/a.go", "package tun\nvar re = regexp.MustCompile(`a`)\n", ":2: re is a global variable"},
		{"globals", "tun/a.go", "package tun\nvar n int\n", ":2: n is a global variable"},
		{"globals", "tun/a.go", "package tun\nvar (\n\tErrA = errors.New(`a`)\n\terrB = fmt.Errorf(`b`)\n)\n", ""},
		{"globals", "tun/a.go", "package tun\nvar _ io.Reader = T{}\n", ""},
		{"globals", "tun/a.go", "package tun\n//go:embed a.html\nvar page string\n", ""},
		{"goroutines", "tun/a.go", "package tun\nfunc f() { go f() }\n", ":2: a bare go statement"},
		{"goroutines", "tun/a.go", "package tun\nfunc f() { g.Go(f) }\n", ""},
	}
	seen := map[string]bool{}
	for _, test := range tests {
		s, err := parse(token.NewFileSet(), test.file, []byte(test.text))
		if err != nil {
			t.Fatal(err)
		}
		seen[test.law] = true
		found := laws()[test.law](s)
		switch {
		case test.want == "" && len(found) > 0:
			t.Errorf("%s finds %v in %q", test.law, found, test.text)
		case test.want != "" && (len(found) == 0 || !strings.Contains(found[0].String(), test.want)):
			t.Errorf("%s finds %v, not %q, in %q", test.law, found, test.want, test.text)
		}
	}
	for name := range laws() {
		if !seen[name] {
			t.Errorf("nothing breaks the law %s", name)
		}
	}
}

func TestPackageCommentsFind(t *testing.T) {
	tests := []struct {
		texts []string
		want  string
	}{
		{[]string{"package p\n"}, "has no comment"},
		{[]string{"// Package p is.\npackage p\n", "package p\n"}, ""},
		{[]string{"// Package p is.\npackage p\n", "// Package p is.\npackage p\n"}, "a second package comment"},
		{[]string{"// Helpers.\npackage p\n"}, "begins with neither"},
		{[]string{"// Command p does.\npackage main\n"}, ""},
	}
	for _, test := range tests {
		var all []*source
		for _, text := range test.texts {
			s, err := parse(token.NewFileSet(), "p/a.go", []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, s)
		}
		found := packageComments(all)
		if test.want == "" && len(found) > 0 || test.want != "" && (len(found) != 1 || !strings.Contains(found[0].String(), test.want)) {
			t.Errorf("%q gives %v, not %q", test.texts, found, test.want)
		}
	}
}

func TestModulesFind(t *testing.T) {
	const text = "module m\nrequire a v1\nrequire (\n\tb v2 // indirect\n)\n"
	if found := modules("go.mod", text, []string{"a v1", "b v2"}); len(found) > 0 {
		t.Errorf("finds %v", found)
	}
	if found := modules("go.mod", text, []string{"a v2"}); len(found) != 1 {
		t.Errorf("a missing pin gives %v", found)
	}
	if found := modules("go.mod", text+"replace a => ../a\n", nil); len(found) != 1 || found[0].pos.Line != 6 {
		t.Errorf("a replacement gives %v", found)
	}
}

func TestIsIgnored(t *testing.T) {
	const rules = "/bin/\n*.prof\n"
	for name, want := range map[string]bool{"bin": true, "cpu.prof": true, "attic": false} {
		if got := isIgnored(rules, name); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
