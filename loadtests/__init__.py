# SPDX-License-Identifier: Apache-2.0
"""Load tests of an OpenAI-compatible server; see README.md."""
