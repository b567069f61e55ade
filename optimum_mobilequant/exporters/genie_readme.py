"""The README of a Genie bundle."""

from __future__ import annotations

from collections.abc import Mapping

from .genie_config import Vocabulary
from .options import ExportOptions
from .targets import Soc

_TEXT = """# Genie bundle for {name}

Compiled by optimum-mobilequant for {soc} (Hexagon {arch}, soc_model {model}) with QAIRT {sdk}.
Context: {context} tokens; prompts are read {chunk} at a time.

| file | what it is |
|---|---|
| `genie_config.json`, `htp_backend_ext_config.json` | configuration; names `prompt.bin` and `token.bin` |
| `prompt.bin`, `token.bin` | one graph each ({prompt} and {token} MB). Both were loaded in the HTP emulator |
{shared}| `tokenizer.json` | the model's own |
{state}| `metadata.json` | where all this comes from, and digests |

{bos}
{prefix}
## On this computer

The emulator reads the same files (slowly: use it for small models):

```bash
python -m optimum_mobilequant.exporters.genie_runner . --prompt "Once upon a time" --tokens 16
```

## On a phone

**None of the commands below was run by those who wrote them: they had no phone.** They need Android's `adb`, and
Qualcomm's QAIRT SDK {sdk} or newer, unpacked at `$QAIRT`.

```bash
adb shell mkdir -p /data/local/tmp/genie/bundle
for f in libGenie.so libQnnHtp.so libQnnHtpNetRunExtensions.so libQnnSystem.so libQnnHtp{stub}Stub.so; do
  adb push $QAIRT/lib/aarch64-android/$f /data/local/tmp/genie/
done
adb push $QAIRT/lib/hexagon-{arch}/unsigned/libQnnHtp{stub}Skel.so /data/local/tmp/genie/
adb push $QAIRT/bin/aarch64-android/genie-t2t-run /data/local/tmp/genie/
adb push . /data/local/tmp/genie/bundle
adb shell chmod +x /data/local/tmp/genie/genie-t2t-run
adb shell 'cd /data/local/tmp/genie/bundle && export LD_LIBRARY_PATH=/data/local/tmp/genie && \\
  ADSP_LIBRARY_PATH=$LD_LIBRARY_PATH ../genie-t2t-run -c genie_config.json -p "Once upon a time"'
```
{less}"""
_SHARED_ROWS = (
    "| `genie_config_shared.json`, `htp_backend_ext_config_shared.json` | configuration; names `shared.bin` |\n"
    "| `shared.bin` | both graphs over one copy of the weights ({size} MB). Compiled, but no emulator can load such a "
    "file: nothing of it was run |\n"
)
_STATE_ROW = (
    "| `prefix` | a dialog that has read the checkpoint's prefix: {count} tokens, in the first places of the cache |\n"
)
_PREFIX = """
**The model needs its prefix.** An application calls `GenieDialog_restore(dialog, "prefix")` after creating a dialog,
and again after every `GenieDialog_reset`; without it the text is much worse. The emulator's runner below does.
"""
_LESS = """
`-c genie_config_shared.json` runs the binary that holds the weights once, which takes about half the memory. For that
alone push `shared.bin` and leave `prompt.bin` and `token.bin` out; without it, leave `shared.bin` out.
"""


def readme(
    chip: Soc,
    options: ExportOptions,
    sdk: str,
    binaries: Mapping[str, int],
    vocabulary: Vocabulary,
    name: str,
    prefix: int = 0,
) -> str:
    """Text of a bundle's README.

    Args:
        binaries: file name -> bytes.
        name: of the checkpoint.
        prefix: number of tokens of its prefix.
    """
    size = {file: f"{count / 1e6:.1f}" for file, count in binaries.items()}
    shared = "shared.bin" in size
    return _TEXT.format(
        name=name,
        soc=chip.name.upper(),
        arch=chip.dsp_arch,
        model=chip.soc_model,
        sdk=sdk,
        context=options.context,
        chunk=options.prompt_length,
        prompt=size["prompt.bin"],
        token=size["token.bin"],
        shared=_SHARED_ROWS.format(size=size["shared.bin"]) if shared else "",
        less=_LESS if shared else "",
        prefix=_PREFIX if prefix else "",
        state=_STATE_ROW.format(count=prefix) if prefix else "",
        bos=(
            "Genie puts no BOS token before a prompt, as the model's tokenizer puts none."
            if vocabulary.bos is None
            else f"Genie puts the BOS token ({vocabulary.bos}) before a prompt, as the model's tokenizer does."
        )
        + " A chat model's template is not applied: write its text, special tokens included, into the prompt.",
        stub=chip.dsp_arch.upper(),
    )
