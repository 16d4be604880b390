package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"overlay/coord"
)

// versionInfo is the JSON of `overlay version`.
type versionInfo struct {
	Schema   int    `json:"schema"`
	Version  string `json:"version"`
	Protocol int    `json:"protocol"` // spoken with the server
	Go       string `json:"go"`
}

// versionCommand tells which program this is.
func versionCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON {
				return printJSON(cmd.OutOrStdout(), versionInfo{schema, version(), coord.Version, runtime.Version()})
			}
			return printLine(cmd.OutOrStdout(), "overlay "+version())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// version is what the go command stamped into the program.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}
