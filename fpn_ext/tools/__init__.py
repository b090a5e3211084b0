"""One file per verb of ``fpn-ext``: what it takes, and which room does the work."""
