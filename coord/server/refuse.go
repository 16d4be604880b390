package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"overlay/coord"
	"overlay/coord/store"
)

// refuse makes an Error for the caller.
func refuse(code coord.Code, format string, args ...any) *coord.Error {
	return &coord.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// hinted adds what the caller can do.
func hinted(e *coord.Error, format string, args ...any) *coord.Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

func status(c coord.Code) int {
	switch c {
	case coord.CodeNoIdentity:
		return http.StatusUnauthorized
	case coord.CodeBadRequest, coord.CodeBadKey, coord.CodeBadCandidates:
		return http.StatusBadRequest
	case coord.CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case coord.CodeNameTaken, coord.CodeAddressTaken:
		return http.StatusConflict
	case coord.CodeRateLimited:
		return http.StatusTooManyRequests
	case coord.CodeVersion:
		return http.StatusUpgradeRequired
	case coord.CodeNoAddress, coord.CodeStorage:
		return http.StatusInsufficientStorage
	case coord.CodeInternal:
		return http.StatusInternalServerError
	}
	return http.StatusForbidden
}

// asError makes an Error of any failure. What is the server's own matter is
// logged and not told.
func asError(err error, log *slog.Logger) *coord.Error {
	var refused *coord.Error
	switch {
	case errors.As(err, &refused):
		return refused
	case errors.Is(err, store.ErrFull):
		log.Error("cannot save", "err", err)
		return hinted(refuse(coord.CodeStorage, "the coordinator cannot save: %v", store.ErrFull),
			"nothing was changed; free space on the server, then repeat")
	case errors.Is(err, context.Canceled):
		return refuse(coord.CodeInternal, "the request was given up")
	}
	log.Error("request failed", "err", err)
	return refuse(coord.CodeInternal, "the coordinator failed; its log says why")
}

func writeError(w http.ResponseWriter, e *coord.Error) {
	if e.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(e.RetryAfter/time.Second)))
	}
	writeJSON(w, status(e.Code), e)
}

const timeLayout = "2006-01-02 15:04 UTC"

// ago says a span of time as people do.
func ago(d time.Duration) string {
	switch {
	case d < time.Minute:
		return "a moment ago"
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min ago", int(d/time.Minute))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d/time.Hour))
	}
	return fmt.Sprintf("%d days ago", int(d/(24*time.Hour)))
}
