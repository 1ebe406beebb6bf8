"""The Modelfile by which Ollama runs a GGUF file, with the chat template once more as Go's text/template.

text = modelfile("model.gguf", model.config, tokenizer)
"""

import json

from dataset.chat import EOS, TOOLS_AFTER, TOOLS_BEFORE
from dataset.tokenizer import ChatTokenizer
from model.model import MiniMindConfig

# Ollama renders prompts with Go templates, so this is chat_template.jinja once more. A trimmed newline ({{- or -}}) is
# written as {{ "\n" }} where the prompt needs it. <think>, </think> and the first <tool_call> are text and not strings:
# there Ollama looks for the marks by which it parses answers. That `if` must be the first with .ToolCalls, hence
# $message.ToolCalls before it.
_OLLAMA_TEMPLATE = """\
{{- if or .System .Tools }}{{ "<|im_start|>system\\n" }}{{ .System }}
{{- if .Tools }}{{ if .System }}{{ "\\n\\n" }}{{ end }}%s
{{- range $i, $tool := .Tools }}{{ if $i }}{{ "\\n" }}{{ end }}{{ $tool }}{{ end }}%s
{{- end }}{{ "<|im_end|>\\n" }}{{ end }}
{{- $before := "" }}
{{- range $i, $message := .Messages }}
{{- if and (eq $before "tool") (ne .Role "tool") }}{{ "<|im_end|>\\n" }}{{ end }}
{{- if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}
{{- else if eq .Role "assistant" }}{{ "<|im_start|>assistant\\n" }}%s{{ .Content }}
{{- if and .Content $message.ToolCalls }}{{ "\\n" }}{{ end }}
{{- if .ToolCalls }}<tool_call>
{{- range $j, $call := .ToolCalls }}{{ if $j }}{{ "\\n<tool_call>" }}{{ end }}
{{- "\\n" }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}{{ "\\n</tool_call>" }}
{{- end }}{{ end }}{{ "<|im_end|>\\n" }}
{{- else if eq .Role "tool" }}{{ if ne $before "tool" }}{{ "<|im_start|>user" }}{{ end }}
{{- "\\n<tool_response>\\n" }}{{ .Content }}{{ "\\n</tool_response>" }}
{{- end }}{{ $before = .Role }}
{{- end }}{{ if eq $before "tool" }}{{ "<|im_end|>\\n" }}{{ end }}{{ "<|im_start|>assistant\\n" }}%s"""
_THOUGHT = """{{ if .Thinking }}<think>
{{ .Thinking }}
</think>

{{ end }}"""
_OPEN_THOUGHT = r"""
{{- if .IsThinkSet }}{{ if .Think }}{{ "<think>\n" }}{{ else }}{{ "<think>\n\n</think>\n\n" }}{{ end }}{{ end }}"""


def modelfile(gguf_name: str, config: MiniMindConfig, tokenizer: ChatTokenizer, thinks: bool = True) -> str:
    """The text of an Ollama Modelfile for a GGUF file that lies beside it. thinks: as in save_gguf(); Ollama switches
    thinking on for each model whose template has it.

    What Go's text/template makes of it equals chat_template.jinja for system, several turns, thinking on and off, calls
    and results of tools, but for JSON: Ollama hands over schemas and arguments without spaces. It also joins all system
    messages, and neighbours of one role."""
    context = min(config.max_position_embeddings, 2048)
    begin = f"# ollama create minimind -f Modelfile && ollama run minimind\nFROM ./{gguf_name}\n"
    end = f"PARAMETER num_ctx {context}\nPARAMETER temperature 0.7\nPARAMETER top_p 0.9\n"
    if tokenizer.has_own_template:  # Ollama knows the usual ones by what stands in the GGUF file
        stops = [tokenizer.id_to_token(i) for i in sorted(tokenizer.stop_ids)]
        return begin + "".join(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}\n" for stop in stops) + end
    before, after = (f"{{{{ {json.dumps(text)} }}}}" for text in (TOOLS_BEFORE, TOOLS_AFTER))
    thought, open_thought = (_THOUGHT, _OPEN_THOUGHT) if thinks else ("", "")
    template = _OLLAMA_TEMPLATE % (before, after, thought, open_thought)
    return f'{begin}TEMPLATE """{template}"""\nPARAMETER stop {EOS}\n{end}'
