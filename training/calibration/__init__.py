"""Calibration of similarity to probability, fitted without labels."""
