"""Load for a running server, by locust: who calls, what they send, how much, and what must hold. See docs/load.md."""
