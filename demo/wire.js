// What the tabs with a script of their own share: asking the server and reading its long answers.
const Wire = (() => {
  // Returns a function that posts to one group of addresses; every error is one line.
  const asker = (group) => async (path, body, kind = "application/json") => {
    let answer;
    try {
      answer = await fetch(`${group}/${path}`, {
        method: "POST", body, headers: { "content-type": kind }, credentials: "same-origin",
      });
    } catch {
      throw new Error("The server does not answer. Is the demo still running?");
    }
    if (answer.ok) return answer;
    let said = null;
    try { said = (await answer.json()).detail; } catch { /* not ours */ }
    const error = new Error(typeof said === "string" ? said : `error ${answer.status}`);
    error.isGone = answer.status === 410;
    throw error;
  };

  async function* messages(answer) { // a letter, 4 bytes of length, the content
    const reader = answer.body.getReader();
    let rest = new Uint8Array(0);
    for (;;) {
      while (rest.length >= 5) {
        const length = new DataView(rest.buffer, rest.byteOffset).getUint32(1);
        if (rest.length < 5 + length) break;
        yield [String.fromCharCode(rest[0]), rest.slice(5, 5 + length)];
        rest = rest.subarray(5 + length);
      }
      const { done, value } = await reader.read();
      if (done) return;
      const joined = new Uint8Array(rest.length + value.length);
      joined.set(rest);
      joined.set(value, rest.length);
      rest = joined;
    }
  }

  return { asker, messages };
})();
