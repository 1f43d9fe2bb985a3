"""Attacks on the real server, loopback only, each bounded in count and time: `make torture`. See docs/reliability.md."""
