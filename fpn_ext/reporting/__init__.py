"""Output of commands: findings, JSON, drawings, measurements and their provenance."""
