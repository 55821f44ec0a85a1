"""Where the tools of others meet this one."""
