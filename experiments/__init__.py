"""What measures the project; run as python -m experiments.NAME."""
