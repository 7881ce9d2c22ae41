// Package process runs a command in the guest together with everything that it
// starts: a single reaper collects every child's status, and a command's whole
// tree (background jobs, sessions of their own, double forks) can be signalled,
// killed and known to be gone.
//
// In a virtual machine each command has a control group of its own, which the
// kernel kills as one. Elsewhere (a sandbox, a plain host) the tree is found in
// /proc by parentage, session, and a marker in the environment.
//
// Linux only.
package process
