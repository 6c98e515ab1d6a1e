"""The demos: adaptation to one site, and the cycle on a simulated site."""
