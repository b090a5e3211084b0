"""One file per verb of ``fpn-ext``: its arguments, and the call that does the work."""
