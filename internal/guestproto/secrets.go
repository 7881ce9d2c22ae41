package guestproto

// ActionSetSecrets gives the guest its secrets, since protocol version 4.
const ActionSetSecrets = "set_secrets"

// SecretsDir is where the guest's secrets lie, in memory only.
const SecretsDir = "/run/pyro-secrets"

// SetSecrets replaces the files in SecretsDir: those of before are gone.
type SetSecrets struct {
	Envelope
	// Secrets are values by name. A name is one that CheckWorkloadName takes.
	Secrets map[string][]byte `json:"secrets"`
}

// SetSecretsReply answers SetSecrets.
type SetSecretsReply struct {
	// Stored is false where the guest agent has no memory-backed place of its
	// own, as on engine host: then there are no files.
	Stored bool `json:"stored"`
}
