package tun

import (
	"fmt"
	"slices"
	"strings"
)

// Switches of Config.Offloads.
const (
	offGSO   = "-gso"
	forceGSO = "+gso" // also on kernels known to mangle trains
	offGRO   = "-gro"
	offTSO   = "-tso"
	offLarge = "-large" // plain WireGuard format, to and from all peers
)

// CheckOffloads refuses what cannot stand in Config.Offloads: a list, separated
// by commas, with a word that is no switch. The error names those there are.
func CheckOffloads(list string) error {
	if list == "" {
		return nil
	}
	known := []string{offGSO, forceGSO, offGRO, offTSO, offLarge}
	for word := range strings.SplitSeq(list, ",") {
		if !slices.Contains(known, word) {
			return fmt.Errorf("offload switch %q is none of %s", word, strings.Join(known, ", "))
		}
	}
	return nil
}

// switched reports whether one of Config.Offloads's switches is set.
func (c *Config) switched(name string) bool {
	return slices.Contains(strings.Split(c.Offloads, ","), name)
}
