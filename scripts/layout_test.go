// Package scripts holds the laws of the code as tests: who may import whom,
// what is documented, how long things may be. Design §2, §3 and §13.
package scripts

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	module       = "overlay"
	root         = ".."
	maxFileLines = 500
	maxFuncLines = 60
)

// room is a row of the table of design §3.
type room struct {
	// ours are the rooms it may import.
	ours []string
	// foreign are the modules, or parts of them, it may import. Every room
	// may import the standard library, except what is in barred.
	foreign []string
	// barred are packages of the standard library that it may not import.
	barred []string
	// quiet says that it opens no socket.
	quiet bool
}

// rooms is the whole import graph of the program: an edge that is not in it
// does not exist. A new edge is first an entry of design §3, then one here.
func rooms() map[string]room {
	const (
		stun = "github.com/pion/stun/v2"
		wg   = "golang.zx2c4.com/wireguard"
		x    = "golang.org/x/"
	)
	return map[string]room{
		"punch": {
			foreign: []string{stun, x + "crypto", x + "sync"},
			barred:  []string{"net", "os", "os/exec", "syscall"},
			quiet:   true,
		},
		"punch/direct":  {ours: []string{"punch"}, foreign: []string{x + "crypto", x + "sync", x + "sys"}},
		"punch/portmap": {foreign: []string{"github.com/huin/goupnp/soap", x + "sync"}},
		"punch/relay":   {ours: []string{"punch"}, foreign: []string{x + "crypto", x + "sync", x + "sys", x + "time"}},
		"punch/nattest": {ours: []string{"punch"}, foreign: []string{stun}, barred: []string{"net", "os/exec"}, quiet: true},
		"tun": {
			ours:    []string{"tun/filter"},
			foreign: []string{wg, "github.com/vishvananda/netlink", x + "net", x + "sync", x + "sys", x + "time"},
		},
		"tun/filter":  {barred: []string{"net", "os", "os/exec", "syscall"}, quiet: true},
		"coord":       {ours: []string{"punch", "coord/trust"}, foreign: []string{x + "sync", x + "sys"}},
		"coord/trust": {foreign: []string{x + "crypto"}, barred: []string{"os", "os/exec", "net/http", "syscall"}, quiet: true},
		"coord/store": {foreign: []string{"go.etcd.io/bbolt", x + "sync", x + "sys"}, barred: []string{"net"}},
		"coord/server": {
			ours:    []string{"coord", "coord/store", "coord/trust", "punch", "punch/relay"},
			foreign: []string{stun, x + "crypto", x + "sync", x + "sys", x + "time"},
		},
		"overlay": {
			ours:    []string{"coord", "coord/trust", "punch", "punch/direct", "punch/portmap", "punch/relay", "tun", "tun/filter"},
			foreign: []string{wg + "/wgctrl", x + "crypto", x + "net", x + "sync", x + "sys", x + "time"},
		},
		"cmd/overlay": {
			ours:    []string{"coord", "coord/server", "coord/store", "overlay", "punch/relay"},
			foreign: []string{"github.com/spf13/cobra", "github.com/okzk/sdnotify", x + "sync", x + "sys", x + "term"},
		},
	}
}

// topLevel says which entries the top level has besides dot files.
func topLevel() []string {
	return []string{
		"LICENSE", "README.md", "cmd", "coord", "go.mod", "go.sum", "overlay", "punch", "scripts", "tun",
	}
}

// source is one Go file that is not a test.
type source struct {
	fset *token.FileSet
	ast  *ast.File
	// path is relative to the root of the module, with slashes.
	path  string
	lines int
}

func (s *source) room() string { return path.Dir(s.path) }

// outside says that the file ships: it is not of the scripts.
func (s *source) outside() bool { return !strings.HasPrefix(s.path, "scripts/") }

// finding is one broken law, where it is, and what to do.
type finding struct {
	pos  token.Position
	text string
}

func (s *source) at(pos token.Pos, text string) finding {
	p := s.fset.Position(pos)
	p.Filename, p.Column = s.path, 0
	return finding{p, text}
}

func (f finding) String() string { return f.pos.String() + ": " + f.text }

func parse(fset *token.FileSet, name string, text []byte) (*source, error) {
	tree, err := parser.ParseFile(fset, name, text, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	return &source{fset: fset, ast: tree, path: name, lines: strings.Count(string(text), "\n")}, nil
}

// sources are all Go files of the module but tests, for every platform.
func sources(t *testing.T) []*source {
	t.Helper()
	var all []*source
	fset := token.NewFileSet()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if base := d.Name(); name != root && (base == "testdata" || base[0] == '.' || base[0] == '_') {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		s, err := parse(fset, filepath.ToSlash(rel), text)
		all = append(all, s)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestLayout(t *testing.T) {
	all := sources(t)
	if len(all) == 0 {
		t.Fatal("no Go files found")
	}
	for name, law := range laws() {
		t.Run(name, func(t *testing.T) {
			for _, s := range all {
				for _, f := range law(s) {
					t.Error(f)
				}
			}
		})
	}
	t.Run("package comments", func(t *testing.T) {
		for _, f := range packageComments(all) {
			t.Error(f)
		}
	})
}

func TestTopLevel(t *testing.T) {
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	ignored, err := os.ReadFile(filepath.Join(root, ".gitignore"))
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, e := range entries {
		if name := e.Name(); name[0] != '.' && !isIgnored(string(ignored), name) {
			have = append(have, name)
		}
	}
	for _, name := range have {
		if !slices.Contains(topLevel(), name) {
			t.Errorf("%s:1: the top level has no such entry (design §2): move it into a room", name)
		}
	}
	for _, name := range topLevel() {
		if !slices.Contains(have, name) {
			t.Errorf("%s:1: the top level lacks it (design §2): add it", name)
		}
	}
}

// isIgnored reads the kinds of lines our .gitignore has: names and patterns.
func isIgnored(rules, name string) bool {
	for rule := range strings.Lines(rules) {
		if ok, err := path.Match(strings.Trim(strings.TrimSpace(rule), "/"), name); ok && err == nil {
			return true
		}
	}
	return false
}

// TestModules proves the pins that something depends on: see design §2 and §6,
// and, for the tools, that results are the same on every machine.
func TestModules(t *testing.T) {
	pins := map[string][]string{
		"go.mod": {
			"golang.zx2c4.com/wireguard v0.0.0-20260522210424-ecfc5a8d5446",
			"golang.zx2c4.com/wireguard/wgctrl v0.0.0-20241231184526-a9ab2273dd10",
			"github.com/pion/stun/v2 v2.0.0",
			"github.com/vishvananda/netlink v1.3.1",
			"github.com/pion/dtls/v2 v2.2.12",
		},
		"scripts/tools.mod": {
			"honnef.co/go/tools v0.8.2",
			"mvdan.cc/gofumpt v0.12.0",
			"golang.org/x/tools v0.52.0",
			"golang.org/x/perf v0.0.0-20260908200009-22c9c6c9d4da",
		},
	}
	for name, want := range pins {
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range modules(name, string(text), want) {
			t.Error(f)
		}
	}
}

// modules finds the pins that a module file lacks, and replacements: every
// dependency is what its author published.
func modules(name, text string, pins []string) []finding {
	var found []finding
	var have []string
	line := 0
	for text := range strings.Lines(text) {
		line++
		text, _, _ = strings.Cut(text, "//")
		fields := strings.Fields(strings.TrimPrefix(text, "require "))
		if slices.Contains(fields, "=>") || slices.Contains(fields, "replace") {
			pos := token.Position{Filename: name, Line: line}
			found = append(found, finding{pos, "a module is replaced: use what its author published"})
		}
		have = append(have, strings.Join(fields, " "))
	}
	for _, pin := range pins {
		if !slices.Contains(have, pin) {
			found = append(found, finding{
				token.Position{Filename: name, Line: 1},
				"lacks the line " + pin + ": go get that version, or change the pin here with its reason",
			})
		}
	}
	return found
}
