"""Hosts with systemd to apply the playbook to: a root, machines booted from it, who calls them."""
