"""Where releases and texts come from: what the stages that pin them and the watcher that looks for new ones both know."""
