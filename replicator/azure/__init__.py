"""Azure: blobs, disks and machines, through Azure's own SDKs."""
