"""From candidate to champion, through a gate."""
