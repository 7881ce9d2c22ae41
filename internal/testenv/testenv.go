// Package testenv decides what happens when a test lacks something that only
// some machines have: a tool, a network, a guest. Such a test is skipped with
// the reason; the environment variable PYRO_TEST_REQUIRE (a comma-separated
// list of words, "all" for every one) turns the skip into a failure, so that a
// machine meant to run everything cannot pass by running nothing.
package testenv

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// Variable is the name of the environment variable that lists what this
// machine must have.
const Variable = "PYRO_TEST_REQUIRE"

// Require skips the test unless ok, or fails it where what is listed in
// PYRO_TEST_REQUIRE. what is one lower-case word ("qemu"); why says in one
// phrase what is missing.
func Require(t testing.TB, what string, ok bool, why string) {
	t.Helper()
	if ok {
		return
	}
	if required(os.Getenv(Variable), what) {
		t.Fatalf("%s is required by %s=%s: %s", what, Variable, os.Getenv(Variable), why)
	}
	t.Skipf("no %s: %s", what, why)
}

// RequireTools is [Require] for programs that must be on PATH.
func RequireTools(t testing.TB, what string, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		_, err := exec.LookPath(tool)
		Require(t, what, err == nil, tool+" is not on PATH")
	}
}

func required(list, what string) bool {
	words := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
	return slices.Contains(words, what) || slices.Contains(words, "all")
}

// Wanted reports whether PYRO_TEST_REQUIRE lists what. It is for tests that
// are too slow, or ask too much of others, to run unasked.
func Wanted(what string) bool { return required(os.Getenv(Variable), what) }
