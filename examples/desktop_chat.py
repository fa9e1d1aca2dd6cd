"""A chat in a desktop program: the window stays alive while a worker thread loads the model and writes.

    python examples/desktop_chat.py ARTIFACT

Widgets of tkinter may be touched by one thread only. So the worker puts what happens into a queue, the window looks
into it 30 times a second, and `Conversation` knows nothing of windows.
"""

from __future__ import annotations

import argparse
import queue
import threading
import tkinter as tk
from collections.abc import Callable
from dataclasses import dataclass
from tkinter import ttk
from typing import Literal

import normistral

POLL_MS = 33
NOTES = {"ready": "{} is ready.", "done": "({})", "error": "{}"}


@dataclass(frozen=True, slots=True)
class Event:
    """What the worker has to tell: the model is there, a piece of text, how an answer ended, or what went wrong."""

    kind: Literal["ready", "text", "done", "error"]
    text: str = ""


class Conversation:
    """A model and one chat in a thread of their own; every method returns at once.

    Attributes:
        events: what has happened, oldest first.
    """

    def __init__(self, load: Callable[[], normistral.Model]) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self._messages: queue.Queue[str | None] = queue.Queue()
        self._chat: normistral.Chat | None = None
        self._cancelled = threading.Event()  # also before the first token, when the chat has nothing yet to cancel
        self._closing = threading.Event()
        self._worker = threading.Thread(target=self._work, args=(load,), name="model")
        self._worker.start()

    def send(self, message: str) -> None:
        """Ask; the answer comes as events that end with "done" or "error"."""
        self._cancelled.clear()
        self._messages.put(message)

    def cancel(self) -> None:
        """Stop the answer within one token; what was written stays part of the conversation."""
        self._cancelled.set()
        if self._chat is not None:
            self._chat.cancel()

    def close(self) -> None:
        """Stop, and free the model; `wait` waits for that."""
        self._closing.set()
        self._messages.put(None)
        self.cancel()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the worker has ended."""
        self._worker.join(timeout_s)
        return not self._worker.is_alive()

    def _work(self, load: Callable[[], normistral.Model]) -> None:
        try:
            with load() as model:
                self._chat = model.chat()
                self.events.put(Event("ready", model.name))
                while (message := self._messages.get()) is not None and not self._closing.is_set():
                    self._answer(self._chat, message)
        except normistral.NormistralError as exc:
            self.events.put(Event("error", f"{exc.message}\n{exc.hint}".strip()))

    def _answer(self, chat: normistral.Chat, message: str) -> None:
        try:
            for chunk in chat.stream(message):
                if chunk.text:
                    self.events.put(Event("text", chunk.text))
                if chunk.finish_reason is not None:
                    self.events.put(Event("done", chunk.finish_reason))
                if self._cancelled.is_set():
                    chat.cancel()
        except normistral.NormistralError as exc:  # such as a full context: the conversation is as it was before
            self.events.put(Event("error", f"{exc.message}\n{exc.hint}".strip()))


class Window:
    """The conversation above, the message below."""

    def __init__(self, root: tk.Tk, conversation: Conversation) -> None:
        self.root, self.conversation = root, conversation
        root.title("normistral")
        root.minsize(420, 320)
        root.columnconfigure(0, weight=1)
        root.rowconfigure(0, weight=1)
        self.transcript = tk.Text(
            root,
            wrap="word",
            state="disabled",
            font="TkTextFont",
            padx=16,
            pady=12,
            spacing1=2,
            spacing3=4,
            relief="flat",
        )
        self.transcript.tag_configure("you", background="#e7f0f8", lmargin1=8, lmargin2=8, spacing1=10, spacing3=8)
        self.transcript.tag_configure("note", foreground="#55606d")
        scrollbar = ttk.Scrollbar(root, command=self.transcript.yview)
        self.transcript.configure(yscrollcommand=scrollbar.set)
        self.message = ttk.Entry(root, font="TkTextFont")
        self.button = ttk.Button(root, text="Send", command=self.send, state="disabled")
        self.transcript.grid(row=0, column=0, columnspan=2, sticky="nsew")
        scrollbar.grid(row=0, column=2, sticky="ns")
        self.message.grid(row=1, column=0, sticky="ew", padx=(12, 6), pady=12, ipady=4)
        self.button.grid(row=1, column=1, columnspan=2, padx=(0, 12), pady=12, ipady=2)
        self.message.bind("<Return>", lambda _: self.send())
        root.bind("<Escape>", lambda _: conversation.cancel())
        root.protocol("WM_DELETE_WINDOW", self.close)
        self.message.focus()
        self.show("Loading the model …\n", "note")
        self.poll()

    def send(self) -> None:
        """Send what was typed, unless an answer is being written."""
        message = self.message.get().strip()
        if message and str(self.button["text"]) == "Send" and str(self.button["state"]) == "normal":
            self.message.delete(0, "end")
            self.show(f"{message}\n", "you")
            self.button.configure(text="Stop", command=self.conversation.cancel)
            self.conversation.send(message)

    def poll(self) -> None:
        """Show what has happened since the last look."""
        while not self.conversation.events.empty():
            event = self.conversation.events.get()
            if event.kind == "text":
                self.show(event.text)
                continue
            if event.kind == "done":
                self.show("\n")
            if (note := NOTES[event.kind].format(event.text)) and event.text != "stop":
                self.show(f"{note}\n", "note")
            self.button.configure(text="Send", command=self.send, state="normal")
        self.root.after(POLL_MS, self.poll)

    def show(self, text: str, tag: str = "") -> None:
        """Write at the end, and keep the end in view if it was."""
        at_end = self.transcript.yview()[1] > 0.999
        self.transcript.configure(state="normal")
        self.transcript.insert("end", text, tag)
        self.transcript.configure(state="disabled")
        if at_end:
            self.transcript.see("end")

    def close(self) -> None:
        """The window goes at once; the program ends when the worker has freed the model."""
        self.conversation.close()
        self.root.destroy()


def main(arguments: list[str] | None = None) -> None:
    """Open the window, and wait until it is closed."""
    parser = argparse.ArgumentParser(description="Chat in a window.")
    parser.add_argument("artifact")
    options = parser.parse_args(arguments)
    root = tk.Tk()  # before the thread: without a screen there is nothing to stop
    conversation = Conversation(lambda: normistral.load(options.artifact))
    try:
        Window(root, conversation)
        root.mainloop()
    finally:
        conversation.close()
        conversation.wait()


if __name__ == "__main__":
    main()
