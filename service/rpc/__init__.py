"""gRPC servicers and the conversion of their messages."""
