// Command overlay joins machines behind NATs into one private network and runs
// the coordination server that introduces them to each other.
//
// Standard output is data, standard error is everything else. Every failure is
// one line that says what is wrong and, where there is something to do, one
// indented line that says what; the exit code is that of its kind.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// The first signal ends the verb in order. The second finds the system's
	// own handling again, which ends the process.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:]))
}

// exitCode is the process's exit code for a kind of failure.
func exitCode(k overlay.Kind) int {
	switch k {
	case overlay.Usage:
		return 2
	case overlay.NotRunning:
		return 3
	case overlay.Refused:
		return 4
	case overlay.Permission:
		return 5
	case overlay.NoReply:
		return 6
	case overlay.Unreachable:
		return 7
	}
	return 1
}

// run is one invocation; it gives the exit code.
func run(ctx context.Context, args []string) int {
	root, started := rootCommand(), false
	root.PersistentPreRun = func(*cobra.Command, []string) { started = true }
	root.SetArgs(args)
	root.SetOut(os.Stdout)
	root.SetErr(os.Stderr)
	cmd, err := root.ExecuteContextC(ctx)
	switch {
	case err == nil:
		return 0
	case !started:
		err = usageError(cmd, err)
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		err = &overlay.Error{Kind: overlay.Failure, Message: "interrupted"}
	}
	printError(os.Stderr, err)
	return exitCode(overlay.KindOf(err))
}

// usageError words what cobra found wrong with the arguments as our own errors
// are; its suggestions become the hint.
func usageError(cmd *cobra.Command, err error) error {
	if e, ok := errors.AsType[*overlay.Error](err); ok {
		return e
	}
	message, rest, _ := strings.Cut(err.Error(), "\n")
	e := &overlay.Error{
		Kind: overlay.Usage, Message: strings.TrimSuffix(message, ` for "overlay"`), Hint: "see: " + cmd.CommandPath() + " --help",
	}
	if _, names, ok := strings.Cut(rest, "Did you mean this?"); ok {
		e.Hint = "did you mean: overlay " + strings.Join(strings.Fields(names), ", overlay ")
	}
	return e
}

// badValue is the error for a flag's value, as cobra gives it.
type badValue interface {
	error
	GetValue() string
}

// flagError words what cannot be read of a flag.
func flagError(cmd *cobra.Command, err error) error {
	if bad, ok := errors.AsType[badValue](err); ok && strings.Contains(err.Error(), "strconv.ParseInt") {
		_, name, _ := strings.Cut(err.Error(), `" for "`)
		name, _, _ = strings.Cut(name, `" flag`)
		return failure(overlay.Usage, "see: "+cmd.CommandPath()+" --help", "%s %q is not a number", name, bad.GetValue())
	}
	if cmd.Name() == "ssh" {
		return failure(overlay.Usage, "flags of ssh go after NAME: overlay ssh NAME -p 2222", "%v", err)
	}
	return err
}

// printError writes the message and its hint.
func printError(w io.Writer, err error) {
	fmt.Fprintf(w, "overlay: %s\n", clean(err.Error()))
	if e, ok := errors.AsType[*overlay.Error](err); ok && e.Hint != "" {
		fmt.Fprintf(w, "  %s\n", clean(e.Hint))
	}
}

// failure makes an error for the user; hint may be empty.
func failure(kind overlay.Kind, hint, format string, args ...any) error {
	return &overlay.Error{Kind: kind, Message: fmt.Sprintf(format, args...), Hint: hint}
}
