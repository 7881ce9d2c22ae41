package mcpserver_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/mcpserver"
)

const token = "0123456789abcdef0123456789abcdef"

// serveHTTP runs a server until the test ends and returns its address.
func serveHTTP(t *testing.T, o mcpserver.HTTPOptions) (url string) {
	t.Helper()
	server := must(mcpserver.New(newClient(t), options(t)))(t)
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan string, 1), make(chan error, 1)
	o.Addr, o.Token, o.Ready = "127.0.0.1:0", token, func(url string) { ready <- url }
	go func() { done <- server.ServeHTTP(ctx, o) }()
	t.Cleanup(func() {
		start := time.Now()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("it took %v to stop", took)
		}
		server.Close()
	})
	select {
	case url = <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	return url
}

const initialize = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`

// post sends a request; header lines change the usual ones, and an empty value
// takes one away.
func post(t *testing.T, method, url, body string, header map[string]string) *http.Response {
	t.Helper()
	req := must(http.NewRequest(method, url, strings.NewReader(body)))(t)
	for k, v := range map[string]string{"Authorization": "Bearer " + token, "Content-Type": "application/json", "Accept": "application/json, text/event-stream"} {
		req.Header.Set(k, v)
	}
	for k, v := range header {
		switch {
		case k == "Host":
			req.Host = v
		case v == "":
			req.Header.Del(k)
		default:
			req.Header.Set(k, v)
		}
	}
	res := must(http.DefaultClient.Do(req))(t)
	t.Cleanup(func() { res.Body.Close() })
	return res
}

// The checks that the SDK leaves to its users, and those that it makes: held
// against the next version of it.
func TestHTTPRefuses(t *testing.T) {
	url := serveHTTP(t, mcpserver.HTTPOptions{Hosts: []string{"pyro.example:99"}})
	host := strings.TrimSuffix(strings.TrimPrefix(url, "http://"), "/mcp")
	_, port, _ := net.SplitHostPort(host)
	for _, test := range []struct {
		name   string
		status int
		header map[string]string
		body   string
	}{
		{"Good", 200, nil, initialize},
		{"Localhost", 200, map[string]string{"Host": "localhost:" + port}, initialize},
		{"AllowedHost", 200, map[string]string{"Host": "pyro.example:99"}, initialize},
		{"SameOrigin", 200, map[string]string{"Origin": "http://" + host, "Sec-Fetch-Site": "same-origin"}, initialize},
		{"OtherHost", 403, map[string]string{"Host": "evil.test:" + port}, initialize},
		{"OtherPort", 403, map[string]string{"Host": "localhost:1"}, initialize},
		{"NoPort", 403, map[string]string{"Host": "localhost"}, initialize},
		{"OtherOrigin", 403, map[string]string{"Origin": "https://evil.test"}, initialize},
		{"NullOrigin", 403, map[string]string{"Origin": "null"}, initialize},
		{"CrossSite", 403, map[string]string{"Sec-Fetch-Site": "cross-site"}, initialize},
		{"CrossSiteText", 403, map[string]string{"Origin": "https://evil.test", "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}, initialize},
		{"NoToken", 401, map[string]string{"Authorization": ""}, initialize},
		{"OtherToken", 401, map[string]string{"Authorization": "Bearer " + token + "x"}, initialize},
		{"Basic", 401, map[string]string{"Authorization": "Basic " + token}, initialize},
		{"Text", 415, map[string]string{"Content-Type": "text/plain"}, initialize},
		{"Form", 415, map[string]string{"Content-Type": "application/x-www-form-urlencoded"}, initialize},
		{"NoSuchSession", 404, map[string]string{"Mcp-Session-Id": "guessed"}, `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`},
		{"Nonsense", 400, nil, "nonsense"},
		// Without a method it is an answer, to nothing.
		{"OtherCase", 202, nil, strings.Replace(initialize, `"method"`, `"METHOD"`, 1)},
		{"Huge", 413, nil, `{"jsonrpc":"2.0","id":1,"method":"` + strings.Repeat("x", 9<<20) + `"}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			if res := post(t, "POST", url, test.body, test.header); res.StatusCode != test.status {
				body, _ := io.ReadAll(io.LimitReader(res.Body, 200))
				t.Errorf("status %d, want %d: %s", res.StatusCode, test.status, body)
			}
		})
	}
	for _, method := range []string{"GET", "DELETE", "PUT"} {
		for name, header := range map[string]map[string]string{"NoToken": {"Authorization": ""}, "OtherOrigin": {"Origin": "https://evil.test"}, "OtherHost": {"Host": "evil"}} {
			if res := post(t, method, url, "", header); res.StatusCode != 401 && res.StatusCode != 403 {
				t.Errorf("%s %s: status %d", method, name, res.StatusCode)
			}
		}
	}
	if res := post(t, "GET", strings.TrimSuffix(url, "/mcp")+"/debug/pprof", "", nil); res.StatusCode != 404 {
		t.Errorf("another path: status %d", res.StatusCode)
	}
}

func TestHTTPSession(t *testing.T) {
	url := serveHTTP(t, mcpserver.HTTPOptions{})
	var progress sync.WaitGroup
	progress.Add(1)
	once := sync.OnceFunc(progress.Done)
	peer := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "1"}, &mcp.ClientOptions{
		ProgressNotificationHandler: func(context.Context, *mcp.ProgressNotificationClientRequest) { once() },
	})
	transport := &mcp.StreamableClientTransport{Endpoint: url, HTTPClient: &http.Client{Transport: bearer{}}}
	s := must(peer.Connect(t.Context(), transport, nil))(t)
	defer s.Close()
	params := &mcp.CallToolParams{Name: "vm_run", Arguments: args{"command": "echo hello; sleep 0.5"}}
	params.SetProgressToken("p")
	res := must(s.CallTool(t.Context(), params))(t)
	if res.IsError || res.StructuredContent.(map[string]any)["stdout"] != "hello\n" {
		t.Errorf("got %s", contentText(t, res))
	}
	progress.Wait()
	// Without the token a session's id is worth nothing.
	if res := post(t, "POST", url, `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`, map[string]string{"Mcp-Session-Id": s.ID(), "Authorization": "Bearer stolen-session-other-token"}); res.StatusCode != 401 {
		t.Errorf("status %d with the id of a session", res.StatusCode)
	}
}

type bearer struct{}

func (bearer) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Header.Set("Authorization", "Bearer "+token)
	return http.DefaultTransport.RoundTrip(req)
}

func TestHTTPSessionsAreBounded(t *testing.T) {
	url := serveHTTP(t, mcpserver.HTTPOptions{})
	opened, refused := 0, 0
	var id string
	for range 70 {
		switch res := post(t, "POST", url, initialize, nil); res.StatusCode {
		case 200:
			opened++
			id = res.Header.Get("Mcp-Session-Id")
			_, _ = io.Copy(io.Discard, res.Body)
		case 503:
			refused++
		default:
			t.Fatalf("status %d", res.StatusCode)
		}
	}
	if opened != 64 || refused != 6 {
		t.Errorf("%d opened, %d refused", opened, refused)
	}
	if res := post(t, "DELETE", url, "", map[string]string{"Mcp-Session-Id": id}); res.StatusCode != 204 {
		t.Errorf("ending one: status %d", res.StatusCode)
	}
	if res := post(t, "POST", url, initialize, nil); res.StatusCode != 200 {
		t.Errorf("after the end of one: status %d", res.StatusCode)
	}
}

func TestHTTPAddresses(t *testing.T) {
	server := must(mcpserver.New(newClient(t), options(t)))(t)
	defer server.Close()
	for _, test := range []struct {
		name string
		o    mcpserver.HTTPOptions
		want error
	}{
		{"All", mcpserver.HTTPOptions{Addr: "0.0.0.0:0", Token: token}, api.ErrDenied},
		{"Empty", mcpserver.HTTPOptions{Addr: ":0", Token: token}, api.ErrDenied},
		{"Name", mcpserver.HTTPOptions{Addr: "example.org:80", Token: token}, api.ErrDenied},
		{"NoPort", mcpserver.HTTPOptions{Addr: "127.0.0.1", Token: token}, api.ErrInvalid},
		{"NoToken", mcpserver.HTTPOptions{Addr: "127.0.0.1:0"}, api.ErrInvalid},
		{"ShortToken", mcpserver.HTTPOptions{Addr: "127.0.0.1:0", Token: "short"}, api.ErrInvalid},
	} {
		if err := server.ServeHTTP(t.Context(), test.o); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", test.name, err, test.want)
		}
	}
}

func TestToken(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	got := make(chan string, 8)
	for range cap(got) {
		go func() {
			token, err := mcpserver.MakeToken(file)
			if err != nil {
				t.Error(err)
			}
			got <- token
		}()
	}
	first := <-got
	for range cap(got) - 1 {
		if other := <-got; other != first {
			t.Errorf("two tokens: %q and %q", first, other)
		}
	}
	if st := must(os.Stat(file))(t); st.Mode().Perm() != 0o600 || len(first) < 32 {
		t.Errorf("mode %v, token of %d characters", st.Mode(), len(first))
	}
	if left := must(os.ReadDir(filepath.Dir(file)))(t); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := mcpserver.ReadToken(file); !errors.Is(err, api.ErrDenied) || api.Hint(err) == "" {
		t.Errorf("a token for all to read: %v", err)
	}
}

func TestHTTPHeaderThatNeverEnds(t *testing.T) {
	url := serveHTTP(t, mcpserver.HTTPOptions{})
	conn := must(net.Dial("tcp", strings.TrimSuffix(strings.TrimPrefix(url, "http://"), "/mcp")))(t)
	defer conn.Close()
	if _, err := conn.Write(append([]byte("POST /mcp HTTP/1.1\r\nX: "), bytes.Repeat([]byte("x"), 64<<10)...)); err != nil {
		t.Fatal(err)
	}
	// The connection may be reset before the answer is read.
	if answer, err := io.ReadAll(conn); err == nil && !bytes.Contains(answer, []byte("431")) {
		t.Errorf("answer %q", answer)
	}
}
