"""Whatever a message holds, it stays inside its turn: the control tokens of a prompt are those of the template."""

import pytest
from fuzzing import examples, hostile_texts, is_unicode, require_readable
from hypothesis import assume, given
from hypothesis import strategies as st
from text_models import BACKENDS, NORMISTRAL, chat_template, wrap
from tiny_models import THINKING_TEMPLATE

from normistral.artifact.chat_template import CHATML, ROLES
from normistral.errors import TemplateError, UsageError

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content | trim "
    "+ ' [/INST]' }}{% else %}{{ message['content'] | trim ~ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"normistral": NORMISTRAL, "chatml": CHATML, "thinking": THINKING_TEMPLATE, "mistral": MISTRAL}
roles = st.sampled_from(sorted(ROLES))
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": hostile_texts()}), min_size=1, max_size=4)


def skeleton(template, ids):
    """The control tokens among them, in order."""
    control = {token.id for token in template._encoder.control_tokens}
    return [token_id for token_id in ids if token_id in control]


@pytest.mark.parametrize("backend", BACKENDS)
@examples(25)
@given(conversation=messages, name=st.sampled_from(sorted(TEMPLATES)), prompt=st.booleans())
def test_no_content_adds_or_removes_a_control_token(backend, conversation, name, prompt):
    template = chat_template(BACKENDS[backend](), TEMPLATES[name])
    plain = [message | {"content": "x"} for message in conversation]
    expected = skeleton(template, template.encode(plain, add_generation_prompt=prompt))
    try:
        ids = template.encode(conversation, add_generation_prompt=prompt)
    except UsageError as error:
        require_readable(error)
        ids = None
    assert (ids is not None) == is_unicode("".join(message["content"] for message in conversation))
    if ids is None:
        return
    assert skeleton(template, ids) == expected
    if backend == "byte-level" and name != "mistral":
        text = template.render(conversation, add_generation_prompt=prompt)
        assert wrap(BACKENDS[backend]()).decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("backend", BACKENDS)
@examples(15)
@given(role=hostile_texts(3), content=hostile_texts(3))
def test_no_role_adds_a_control_token(backend, role, content):
    assume(role not in ROLES)
    template = chat_template(BACKENDS[backend](), NORMISTRAL)
    expected = skeleton(template, template.encode([{"role": "x", "content": "x"}]))
    try:
        ids = template.encode([{"role": role, "content": content}])
    except (UsageError, TemplateError):
        return
    assert skeleton(template, ids) == expected
