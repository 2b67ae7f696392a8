"""The version of vtr."""

VERSION = "0.1.0"
