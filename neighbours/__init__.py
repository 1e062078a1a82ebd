"""What Cas-DM stands on or is compared with; off by default."""
