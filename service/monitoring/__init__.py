"""Logs, metrics, traces, health, and the doctor."""
