package api

// Fact is one finding of doctor.
type Fact struct {
	Name   string `json:"name"`
	Value  string `json:"value"`
	OK     bool   `json:"ok"`
	Remedy string `json:"remedy,omitempty"`
}
