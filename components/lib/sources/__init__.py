"""The sources of releases and texts, for the stage that pins them and the watcher that looks for new ones."""
