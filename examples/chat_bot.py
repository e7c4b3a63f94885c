"""A bot for a chat: a run of gpt_2_simple answers messages, asked with OpenAI's client.

gpt_2_simple serve --run_name run1       # in another terminal; or serve --model_name 124M
pip install openai
python examples/chat_bot.py run1         # a chat on standard input; Ctrl-D ends it
"""

import asyncio
import contextlib
import os
import sys

import openai

SETTINGS = {"max_tokens": 60, "temperature": 0.7, "n": 3, "stop": "\n"}


class ChatBot:
    """Continues a chat of lines such as `Ann: Hello`; the line that comes next is the answer."""

    def __init__(self, model="run1", address="http://127.0.0.1:8000", name="Bot"):
        key = os.environ.get("GPT_2_SIMPLE_API_KEY", "none")
        self.client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=key, timeout=60)
        self.model, self.name, self.chats = model, name, {}

    async def answer(self, text, author="You", chat=None):
        message = " ".join(f"{author}: {text}".split())[:500]  # one line, of a limited length
        prompt = f"{self.chats.get(chat, '')}{message}\n{self.name}:"
        options = {**SETTINGS, "extra_body": {"truncate_prompt_tokens": -1}}  # drops old lines
        try:
            made = await self.client.completions.create(model=self.model, prompt=prompt, **options)
        except openai.OpenAIError as error:
            print(f"no answer: {error}", file=sys.stderr)
            return "I cannot answer now."
        written = (choice.text.strip() for choice in made.choices)
        answer = next(filter(None, written), "...")[:2000]  # Discord takes no longer messages
        past = self.chats.get(chat, "")  # others may have written meanwhile
        self.chats[chat] = f"{past}{message}\n{self.name}: {answer}\n"[-4000:]
        return answer


async def talk(bot):
    for text in sys.stdin:
        print(f"{bot.name}: {await bot.answer(text)}", flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may lack some letters
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(talk(ChatBot(*sys.argv[1:])))
