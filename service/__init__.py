"""The gRPC service, which serves a bundle. Nothing here imports torch."""
