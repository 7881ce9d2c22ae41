package guestagent

// Rehearse is what an agent that waits for its host does first.
var Rehearse = rehearse
