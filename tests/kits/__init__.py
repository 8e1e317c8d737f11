"""What tests need and is not a test: processes, stand-ins for others, worlds to play in.

Any test may import it; it imports no test.
"""
