"""From files to tokens: sources -> readers -> records -> chat (template, answers) -> tokenise -> dataset (tokens).

`sources` knows what a path means, `readers` and `tables` kinds of files, `records` and `messages` the forms of an
example, `template`, `sandbox` and `limits` how a conversation becomes text, `answers` and `control` which of it is
trained, `chat` how that becomes tokens. `dataset` puts them together; nothing outside this folder needs more than
`dataset`, `chat`, `tokens` and, for single examples, `records`.
"""
