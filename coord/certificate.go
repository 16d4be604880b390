package coord

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"time"

	"overlay/coord/trust"
)

// pinOf is the SHA-256 of a certificate's SubjectPublicKeyInfo (RFC 7469
// section 2.4), which names a server.
func pinOf(cert *x509.Certificate) trust.Hash {
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo)
}

// deviceCertificate wraps the device key in a certificate, because TLS carries
// keys only so. The dates are fixed: nobody looks at them, and a wrong clock
// must not keep a node out.
func deviceCertificate(device ed25519.PrivateKey) (tls.Certificate, error) {
	if len(device) != ed25519.PrivateKeySize {
		return tls.Certificate{}, fmt.Errorf("device key of %d bytes, want %d", len(device), ed25519.PrivateKeySize)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "overlay"},
		NotBefore:    time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280 section 4.1.2.5: no end
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, device.Public(), device)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make client certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: device}, nil
}
