package scripts

import (
	"fmt"
	"go/ast"
	"go/token"
	"slices"
	"strconv"
	"strings"
)

// law finds what one file breaks.
type law func(*source) []finding

func laws() map[string]law {
	return map[string]law{
		"imports":      imports,
		"stun codec":   stunCodec,
		"sockets":      sockets,
		"doc comments": docComments,
		"lengths":      lengths,
		"init":         noInit,
		"globals":      noGlobals,
		"goroutines":   goroutines,
	}
}

func imports(s *source) []finding {
	if !s.outside() {
		return nil
	}
	r, ok := rooms()[s.room()]
	if !ok {
		return []finding{s.at(s.ast.Package, "no room of this name is in the table of design §3: move the file, or add the room there and in rooms()")}
	}
	var found []finding
	for _, spec := range s.ast.Imports {
		name, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue // the parser has accepted it
		}
		if why := mayNot(r, s.room(), name); why != "" {
			found = append(found, s.at(spec.Pos(), why))
		}
	}
	return found
}

// mayNot says why a room may not import a package, or nothing.
func mayNot(r room, from, name string) string {
	if ours, ok := strings.CutPrefix(name, module+"/"); ok {
		if slices.Contains(r.ours, ours) {
			return ""
		}
		return fmt.Sprintf("%s may not import our %s (design §3): give it what it needs through a parameter or an interface of its own", from, ours)
	}
	first, _, _ := strings.Cut(name, "/")
	if strings.Contains(first, ".") {
		if slices.ContainsFunc(r.foreign, func(allowed string) bool { return name == allowed || strings.HasPrefix(name, allowed+"/") }) {
			return ""
		}
		return fmt.Sprintf("%s may not import %s: do it in the room that may (rooms() in scripts/layout_test.go), or with the standard library", from, name)
	}
	switch {
	case slices.Contains(r.barred, name):
		return fmt.Sprintf("%s may not import %s: it works on bytes and values; do this in its caller", from, name)
	case name == "log":
		return "log is not used here: take a *slog.Logger from the Config"
	case name == "C":
		return "cgo is not used: the program is built with CGO_ENABLED=0"
	}
	return ""
}

// stunCodec keeps pion/stun to its codec: its client and its URIs pull in a
// DTLS with known holes (design §6).
func stunCodec(s *source) []finding {
	return selectors(s, "github.com/pion/stun/v2", func(name string) string {
		for _, part := range []string{"Client", "Dial", "URI", "Agent"} {
			if strings.Contains(name, part) {
				return "stun." + name + " is not of the codec (design §6): use stun.Message, stun.Build and attributes, and send the bytes yourself"
			}
		}
		return ""
	})
}

func sockets(s *source) []finding {
	if !rooms()[s.room()].quiet {
		return nil
	}
	return selectors(s, "net", func(name string) string {
		for _, start := range []string{"Dial", "Listen", "File", "Lookup", "Interface"} {
			if strings.HasPrefix(name, start) {
				return "net." + name + ": " + s.room() + " opens no socket and asks no system (design §3): take it from the caller"
			}
		}
		return ""
	})
}

// selectors judges every name of one imported package that the file uses.
func selectors(s *source, pkg string, judge func(name string) string) []finding {
	local := localName(s.ast, pkg)
	if local == "" {
		return nil
	}
	var found []finding
	ast.Inspect(s.ast, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if x, ok := sel.X.(*ast.Ident); ok && x.Name == local {
			if why := judge(sel.Sel.Name); why != "" {
				found = append(found, s.at(sel.Pos(), why))
			}
		}
		return true
	})
	return found
}

// localName is what a file calls an imported package; empty if it does not
// import it.
func localName(file *ast.File, pkg string) string {
	for _, spec := range file.Imports {
		if spec.Path.Value != strconv.Quote(pkg) {
			continue
		}
		if spec.Name != nil {
			return spec.Name.Name
		}
		parts := strings.Split(pkg, "/")
		last := parts[len(parts)-1]
		if len(last) > 1 && last[0] == 'v' && strings.Trim(last[1:], "0123456789") == "" {
			last = parts[len(parts)-2]
		}
		return last
	}
	return ""
}

func docComments(s *source) []finding {
	if !s.outside() {
		return nil
	}
	var found []finding
	for _, decl := range s.ast.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if d.Name.IsExported() && isPublicReceiver(d) && d.Doc == nil {
				found = append(found, s.at(d.Pos(), noDoc(d.Name.Name)))
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				found = append(found, specDoc(s, d, spec)...)
			}
		}
	}
	return found
}

func specDoc(s *source, d *ast.GenDecl, spec ast.Spec) []finding {
	var names []*ast.Ident
	var documented bool
	switch spec := spec.(type) {
	case *ast.TypeSpec:
		names = []*ast.Ident{spec.Name}
		documented = spec.Doc != nil || !d.Lparen.IsValid() && d.Doc != nil
	case *ast.ValueSpec:
		// One comment may speak for a block of constants.
		names = spec.Names
		documented = spec.Doc != nil || spec.Comment != nil || d.Doc != nil
	}
	var found []finding
	for _, name := range names {
		if name.IsExported() && !documented {
			found = append(found, s.at(name.Pos(), noDoc(name.Name)))
		}
	}
	return found
}

func noDoc(name string) string {
	return name + " has no comment: say what it is, its zero value, units, errors, concurrency; or do not export it"
}

// isPublicReceiver says that a function has no receiver or one whose type is
// exported: other methods are seen only through interfaces.
func isPublicReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil || len(d.Recv.List) == 0 {
		return true
	}
	kind := d.Recv.List[0].Type
	for {
		switch k := kind.(type) {
		case *ast.StarExpr:
			kind = k.X
		case *ast.IndexExpr:
			kind = k.X
		case *ast.IndexListExpr:
			kind = k.X
		case *ast.Ident:
			return k.IsExported()
		default:
			return true
		}
	}
}

func lengths(s *source) []finding {
	var found []finding
	if s.lines > maxFileLines {
		found = append(found, s.at(s.ast.Package, fmt.Sprintf("the file has %d lines, %d are allowed: split it by what its parts do", s.lines, maxFileLines)))
	}
	for _, decl := range s.ast.Decls {
		d, ok := decl.(*ast.FuncDecl)
		if !ok {
			continue
		}
		n := s.fset.Position(d.End()).Line - s.fset.Position(d.Pos()).Line + 1
		if n > maxFuncLines {
			found = append(found, s.at(d.Pos(), fmt.Sprintf("%s has %d lines, %d are allowed: give its steps names", d.Name.Name, n, maxFuncLines)))
		}
	}
	return found
}

func noInit(s *source) []finding {
	var found []finding
	for _, decl := range s.ast.Decls {
		if d, ok := decl.(*ast.FuncDecl); ok && d.Recv == nil && d.Name.Name == "init" {
			found = append(found, s.at(d.Pos(), "init() runs behind everybody's back: do it where it is needed"))
		}
	}
	return found
}

func noGlobals(s *source) []finding {
	var found []finding
	for _, decl := range s.ast.Decls {
		d, ok := decl.(*ast.GenDecl)
		if !ok || d.Tok != token.VAR {
			continue
		}
		for _, spec := range d.Specs {
			v, ok := spec.(*ast.ValueSpec)
			if ok && !isEmbedded(d, v) && !isCheck(v) && !isError(v) {
				found = append(found, s.at(v.Pos(), v.Names[0].Name+" is a global variable: make it a constant, a function, or a field"))
			}
		}
	}
	return found
}

func isEmbedded(d *ast.GenDecl, v *ast.ValueSpec) bool {
	for _, doc := range []*ast.CommentGroup{d.Doc, v.Doc} {
		if doc == nil {
			continue
		}
		for _, c := range doc.List {
			if strings.HasPrefix(c.Text, "//go:embed ") {
				return true
			}
		}
	}
	return false
}

// isCheck knows var _ Interface = value.
func isCheck(v *ast.ValueSpec) bool {
	return !slices.ContainsFunc(v.Names, func(n *ast.Ident) bool { return n.Name != "_" })
}

// isError knows variables made by errors.New or fmt.Errorf.
func isError(v *ast.ValueSpec) bool {
	for _, value := range v.Values {
		call, ok := value.(*ast.CallExpr)
		if !ok {
			return false
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return false
		}
		x, ok := sel.X.(*ast.Ident)
		if !ok || x.Name+"."+sel.Sel.Name != "errors.New" && x.Name+"."+sel.Sel.Name != "fmt.Errorf" {
			return false
		}
	}
	return len(v.Values) > 0
}

func goroutines(s *source) []finding {
	var found []finding
	ast.Inspect(s.ast, func(n ast.Node) bool {
		if g, ok := n.(*ast.GoStmt); ok {
			found = append(found, s.at(g.Pos(), "a bare go statement: start it by Go of an errgroup.Group or sync.WaitGroup that somebody waits for"))
		}
		return true
	})
	return found
}

// packageComments wants one comment per package, on one of its files, that
// begins as godoc wants it.
func packageComments(all []*source) []finding {
	first := map[string]*source{}
	comments := map[string]int{}
	var found []finding
	for _, s := range all {
		dir := s.room()
		if first[dir] == nil {
			first[dir] = s
		}
		if s.ast.Doc == nil {
			continue
		}
		comments[dir]++
		if comments[dir] > 1 {
			found = append(found, s.at(s.ast.Package, "a second package comment: join it with the first"))
		}
		text := s.ast.Doc.Text()
		if name := s.ast.Name.Name; !strings.HasPrefix(text, "Package "+name+" ") && !(name == "main" && strings.HasPrefix(text, "Command ")) {
			found = append(found, s.at(s.ast.Doc.Pos(), "the package comment begins with neither Package "+name+" nor Command: say in one sentence what it is"))
		}
	}
	for dir, s := range first {
		if comments[dir] == 0 {
			found = append(found, s.at(s.ast.Package, "the package has no comment: say in one sentence what it is"))
		}
	}
	return found
}
