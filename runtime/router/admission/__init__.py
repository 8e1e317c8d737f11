"""Who goes now, to which replica, and who waits. Pure, but for `gate`.

It imports the contract and the wire, and nothing else of the router."""
