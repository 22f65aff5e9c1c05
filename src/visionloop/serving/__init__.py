"""The server: answers about images over HTTP and follows the ledger to the newest champion. No torch."""
