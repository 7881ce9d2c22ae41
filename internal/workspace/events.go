package workspace

// The kinds of events in a workspace's history. They are part of what Summary
// returns: never give an old word a new meaning.
const (
	eventCreated         = "created"
	eventStarted         = "started"
	eventForked          = "forked"
	eventPaused          = "paused"
	eventResumed         = "resumed"
	eventStopped         = "stopped"
	eventReset           = "reset"
	eventUpdated         = "updated"
	eventSync            = "sync_push"
	eventWrite           = "file_write"
	eventPatch           = "patch_apply"
	eventExport          = "export"
	eventSnapshot        = "snapshot_created"
	eventSnapshotDeleted = "snapshot_deleted"
	eventService         = "service_started"
	eventMachineEnded    = "machine_ended"
	eventInterrupted     = "interrupted"
)
