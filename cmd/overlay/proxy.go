package main

import (
	"errors"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"overlay/overlay"
)

const (
	proxyUsage = "http://[USER:PASSWORD@]HOST:PORT of the network's proxy, or none"
	noProxy    = "none"
)

// readProxy gives the proxy that the flag --proxy or else the environment names:
// nil when neither does, "" for none.
func readProxy(cmd *cobra.Command, flag string) (*string, error) {
	if cmd.Flags().Changed("proxy") {
		if flag == "" {
			return nil, failure(overlay.Usage, "for none: --proxy none", `--proxy "" names no proxy`)
		}
		if flag == noProxy {
			flag = ""
		}
		return &flag, nil
	}
	for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
		set := os.Getenv(name)
		if set == "" {
			continue
		}
		if !strings.Contains(set, "://") {
			set = "http://" + set // as most programs read it
		}
		if err := (overlay.UpRequest{Proxy: &set}).Check(); err != nil {
			return nil, environmentError(name, err)
		}
		return &set, nil
	}
	return nil, nil
}

// environmentError says that it is a variable that is wrong, not a flag.
func environmentError(name string, err error) error {
	hint := "unset " + name + ", or go without it: --proxy none"
	if e, ok := errors.AsType[*overlay.Error](err); ok {
		return failure(e.Kind, hint, "the variable %s is not usable: %s", name, e.Message)
	}
	return err
}
