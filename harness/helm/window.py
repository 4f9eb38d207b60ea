"""The window service that HELM makes by its class name for our deployments, see `harness.helm.registry`.

It knows token counts only.
"""

from __future__ import annotations

from helm.benchmark.window_services.local_window_service import LocalWindowService
from helm.benchmark.window_services.tokenizer_service import TokenizerService

from engine.errors import RequestError


class SuiteWindowService(LocalWindowService):
    """As HELM's own, but can refuse to drop in-context examples or to cut a prompt."""

    def __init__(
        self,
        service: TokenizerService,
        tokenizer_name: str,
        max_sequence_length: int,
        max_request_length: int,
        end_of_text_token: str,
        prefix_token: str,
        forbid_truncation: bool,
    ) -> None:
        super().__init__(
            service,
            tokenizer_name,
            max_sequence_length,
            max_request_length,
            end_of_text_token=end_of_text_token,
            prefix_token=prefix_token,
        )
        self.forbid_truncation = forbid_truncation

    def fits_within_context_window(self, text: str, expected_completion_token_length: int = 0) -> bool:
        """Whether prompt and completion fit the window.

        Raises:
            RequestError: if they do not and truncation is forbidden.
        """
        tokens = self.get_num_tokens(text)
        if tokens + expected_completion_token_length <= self.max_request_length:
            return True
        if self.forbid_truncation:
            beginning = " ".join(text.split())[:60]
            raise RequestError(
                f"a prompt of {tokens} tokens and {expected_completion_token_length} tokens of answer do not "
                f"fit the model's window of {self.max_request_length}: allow --truncate right, or ask for "
                f"fewer in-context examples with max_train_instances=... (prompt: {beginning!r}...)"
            )
        return False

    def truncate_from_right(self, text: str, expected_completion_token_length: int = 0) -> str:
        """The text as it is where it fits, else its beginning."""
        if self.fits_within_context_window(text, expected_completion_token_length):
            return text
        return str(super().truncate_from_right(text, expected_completion_token_length))
