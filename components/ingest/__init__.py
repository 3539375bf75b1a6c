"""From files on S3, disk or the hub to checked concepts and local model directories."""
