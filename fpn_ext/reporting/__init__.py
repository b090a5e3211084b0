"""What commands say: findings, JSON, drawings, measurements, and where a figure comes from."""
