package mcpserver

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"golang.org/x/net/netutil"

	"github.com/pyro-mcp/pyro/api"
)

// The bounds of the HTTP transport.
const (
	maxSessions    = 64
	maxConnections = 256
	// sessionTimeout is for sessions that are silent: a person at lunch comes
	// back to theirs, a client that crashed does not.
	sessionTimeout  = 2 * time.Hour
	headerTimeout   = 10 * time.Second
	bodyTimeout     = 60 * time.Second
	idleTimeout     = 2 * time.Minute
	maxHeaderBytes  = 32 << 10
	shutdownTimeout = 2 * time.Second
	// minToken is 128 bits in base 64, about.
	minToken, maxToken = 22, 4096
)

// HTTPPath is where the endpoint is.
const HTTPPath = "/mcp"

// HTTPOptions configure the streamable HTTP transport.
type HTTPOptions struct {
	// Addr is HOST:PORT; port 0 takes any that is free.
	Addr string
	// Token is what callers have to show.
	Token string
	// AllowRemote lets Addr be something else than a loopback address.
	AllowRemote bool
	// Hosts are further names, with or without port, that callers may know the
	// server by.
	Hosts []string
	// Ready, which may be nil, hears the URL once connections are taken.
	Ready func(url string)
}

// ServeHTTP serves sessions until ctx ends. It refuses requests without the
// token, for other hosts, and from web pages of other origins.
func (s *Server) ServeHTTP(ctx context.Context, o HTTPOptions) error {
	if len(o.Token) < minToken || len(o.Token) > maxToken {
		return api.Errorf(api.ErrInvalid, "the token has %d characters; it needs between %d and %d", len(o.Token), minToken, maxToken)
	}
	host, _, err := net.SplitHostPort(o.Addr)
	if err != nil {
		return api.WithHint(api.Errorf(api.ErrInvalid, "--http %s is no HOST:PORT", quote(o.Addr)), "pass something like 127.0.0.1:8731")
	}
	if !o.AllowRemote && !isLoopback(host) {
		return api.WithHint(api.Errorf(api.ErrDenied, "--http %s can be reached from other machines", quote(o.Addr)),
			"use 127.0.0.1 and a tunnel, or pass --allow-remote and put something that speaks TLS in front")
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.Addr)
	if err != nil {
		return api.Errorf(api.ErrUnavailable, "listening on %s: %v", quote(o.Addr), err)
	}
	hosts := allowedHosts(listener.Addr().(*net.TCPAddr), host, o.Hosts)
	server := &http.Server{
		Handler:           s.httpHandler(o.Token, hosts),
		ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
		ErrorLog: log.New(logWriter{s.log}, "", 0),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(netutil.LimitListener(listener, maxConnections)) }()
	if o.Ready != nil {
		o.Ready("http://" + listener.Addr().String() + HTTPPath)
	}
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	s.stop()
	s.calls.Wait()
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	if server.Shutdown(bounded) != nil {
		server.Close()
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving HTTP: %w", err)
	}
	return nil
}

type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(p []byte) (int, error) {
	w.log.Info("http", "message", strings.TrimSpace(clean(string(p))))
	return len(p), nil
}

// httpHandler puts the checks before the SDK's handler, which does not look at
// Origin by itself since version 1.6 and at Host only for loopback addresses.
func (s *Server) httpHandler(token string, hosts []string) http.Handler {
	streamable := mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return s.mcp }, &mcp.StreamableHTTPOptions{
		SessionTimeout: sessionTimeout, MaxRequestBodyBytes: maxMessageBytes, Logger: s.log,
		// hosts is stricter, and holds names that whoever runs the server allows.
		DisableLocalhostProtection: true,
	})
	want := sha256.Sum256([]byte(token))
	authorized := auth.RequireBearerToken(func(_ context.Context, given string, _ *http.Request) (*auth.TokenInfo, error) {
		got := sha256.Sum256([]byte(given))
		if subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
			return nil, fmt.Errorf("%w", auth.ErrInvalidToken)
		}
		// The SDK holds every session to the user that began it.
		return &auth.TokenInfo{UserID: hex.EncodeToString(want[:8]), Expiration: time.Now().Add(time.Hour)}, nil
	}, nil)(s.bounded(streamable))
	mux := http.NewServeMux()
	mux.Handle(HTTPPath, http.NewCrossOriginProtection().Handler(authorized))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch origin := r.Header.Get("Origin"); {
		case !slices.Contains(hosts, strings.ToLower(r.Host)):
			http.Error(w, "this server does not answer for that host", http.StatusForbidden)
		case origin != "" && !slices.Contains(hosts, originHost(origin)):
			http.Error(w, "this server does not answer to pages of that origin", http.StatusForbidden)
		default:
			mux.ServeHTTP(w, r)
		}
	})
}

// bounded refuses new sessions where there are many, bodies that are no JSON,
// and bodies that trickle in.
func (s *Server) bounded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
				http.Error(w, "the body must be application/json", http.StatusUnsupportedMediaType)
				return
			}
			if r.Header.Get("Mcp-Session-Id") == "" && s.sessions() >= maxSessions {
				w.Header().Set("Retry-After", "60")
				http.Error(w, fmt.Sprintf("there are %d sessions, which is as many as this server has", maxSessions), http.StatusServiceUnavailable)
				return
			}
			// Not a timeout of the whole request: its answer may take hours.
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
			r.Body = &deadlineBody{ReadCloser: r.Body, w: w}
		}
		next.ServeHTTP(w, r)
	})
}

// A deadlineBody takes the deadline off the connection when it has been read.
type deadlineBody struct {
	io.ReadCloser
	w http.ResponseWriter
}

func (b *deadlineBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		_ = http.NewResponseController(b.w).SetReadDeadline(time.Time{})
	}
	return n, err
}

func (s *Server) sessions() int {
	n := 0
	for range s.mcp.Sessions() {
		n++
	}
	return n
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || (ip != nil && ip.IsLoopback())
}

// allowedHosts are the values of Host that are the server itself.
func allowedHosts(at *net.TCPAddr, host string, further []string) []string {
	port := fmt.Sprint(at.Port)
	names := []string{at.IP.String(), host}
	if at.IP.IsLoopback() {
		names = append(names, "localhost", "127.0.0.1", "::1")
	}
	var hosts []string
	for _, n := range names {
		if n != "" {
			hosts = append(hosts, strings.ToLower(net.JoinHostPort(n, port)))
		}
	}
	for _, h := range further {
		hosts = append(hosts, strings.ToLower(h), strings.ToLower(net.JoinHostPort(h, port)))
	}
	return hosts
}

func originHost(origin string) string {
	u, err := url.Parse(origin)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return "\x00" // "null", an extension's, or nonsense: nobody's
	}
	return strings.ToLower(u.Host)
}

// ReadToken returns the token in a file that nobody else can read.
func ReadToken(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("reading the token: %w", pathError(err, file))
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("reading the token: %w", err)
	}
	if !st.Mode().IsRegular() {
		return "", api.Errorf(api.ErrInvalid, "the token file %s is no regular file", quote(file))
	}
	if st.Mode().Perm()&0o077 != 0 {
		return "", api.WithHint(api.Errorf(api.ErrDenied, "the token file %s can be read by others", quote(file)), "run: chmod 600 %s", file)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxToken+2))
	if err != nil {
		return "", fmt.Errorf("reading the token: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// MakeToken returns the token in a file, which it makes if it is not there.
func MakeToken(file string) (string, error) {
	token, err := ReadToken(file)
	if !errors.Is(err, api.ErrNotFound) {
		return token, err
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".mcp-token-*")
	if err != nil {
		return "", fmt.Errorf("making a token: %w", err)
	}
	defer os.Remove(tmp.Name())
	token = rand.Text() + rand.Text()
	_, err = tmp.WriteString(token + "\n")
	if err = errors.Join(err, tmp.Close()); err != nil {
		return "", fmt.Errorf("making a token: %w", err)
	}
	// A link fails where another server was quicker, whose token it is then.
	if err := os.Link(tmp.Name(), file); errors.Is(err, fs.ErrExist) {
		return ReadToken(file)
	} else if err != nil {
		return "", fmt.Errorf("making a token: %w", err)
	}
	return token, nil
}
