package tun

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// helperEnv makes the test binary another process of a test: the value is what
// it does, helperName the interface.
const (
	helperEnv  = "TUN_TEST_HELPER"
	helperName = "TUN_TEST_INTERFACE"
	helperPort = 40123
)

func TestMain(m *testing.M) {
	if what := os.Getenv(helperEnv); what != "" {
		helper(what)
		return
	}
	goleak.VerifyTestMain(m)
}

// helper prints how Open ended, by the error that callers branch on; opened, it
// stays until it is killed.
func helper(what string) {
	if what == "without tun" {
		err := errors.Join(
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("none", "/dev/net", "tmpfs", 0, ""))
		if err != nil {
			fmt.Println("mount:", err)
			return
		}
	}
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		fmt.Println(err)
		return
	}
	d, err := Open(Config{Name: os.Getenv(helperName), PrivateKey: key, Port: helperPort, MTU: 1400})
	switch {
	case errors.Is(err, ErrNoTUN):
		fmt.Println("no tun")
	case errors.Is(err, ErrPermission):
		fmt.Println("permission")
	case err != nil:
		fmt.Println(err)
	default:
		fmt.Println("open")
		_ = d.Run(context.Background())
	}
}
