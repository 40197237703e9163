// What becomes of a connection, drawn as the way that it goes.
import { useEffect, useState } from "preact/hooks";
import { type Explanation, get } from "./api";
import { State, levelOf } from "./parts";

export function Explain({ query }: { query: URLSearchParams }) {
  const [to, setTo] = useState(query.get("to") ?? "");
  const [from, setFrom] = useState(query.get("from") ?? "");
  const [pid, setPid] = useState(query.get("pid") ?? "");
  const [all, setAll] = useState<Explanation[] | null>(null);
  const [error, setError] = useState("");
  const asked = query.toString();

  useEffect(() => {
    if (!query.get("to")) return;
    const stop = new AbortController();
    setError("");
    get<Explanation[]>("/v1/page/explain?" + asked, stop.signal).then(setAll, (e: Error) => {
      if (stop.signal.aborted) return;
      setAll(null);
      setError(e.message);
    });
    return () => stop.abort();
  }, [asked]);

  const submit = (e: Event) => {
    e.preventDefault();
    const q = new URLSearchParams(Object.entries({ to, from, pid }).filter(([, v]) => v.trim() !== "").map(([k, v]) => [k, v.trim()]));
    q.set("n", String(Number(query.get("n") ?? 0) + 1)); // the same question again has another answer, perhaps
    location.hash = "#/explain?" + q.toString();
  };
  return (
    <section aria-label="Explain">
      <form class="tools" onSubmit={submit}>
        <label>to <input required placeholder="10.96.0.10:3306, or a service" value={to} onInput={(e) => setTo(e.currentTarget.value)} /></label>
        <label>by process <input inputMode="numeric" placeholder="its id" value={pid} onInput={(e) => setPid(e.currentTarget.value)} /></label>
        <label>or packets from <input placeholder="198.51.100.7" value={from} onInput={(e) => setFrom(e.currentTarget.value)} /></label>
        <button type="submit">Explain</button>
      </form>
      {error && <p role="alert"><State level={2}>no answer</State> {error}</p>}
      <div aria-live="polite">{all?.map((e, i) => <Way key={i} e={e} from={query.get("from")} pid={query.get("pid")} />)}</div>
    </section>
  );
}

function Way({ e, from, pid }: { e: Explanation; from: string | null; pid: string | null }) {
  const level = e.works ? 0 : e.verdict === "passes" || e.verdict === "no-service" ? 1 : 2;
  return (
    <article>
      <h2><State level={level}>{e.verdict}</State> <code>{e.destination}</code></h2>
      <p class="conclusion">{e.conclusion}</p>
      <ol class="way">
        <li class="stop"><b>{from ? "packets from " + from : pid ? "process " + pid : "a process of this host"}</b></li>
        {e.steps.map((s) => <li><b>{s.what}</b><span>{s.found}</span></li>)}
        {e.backends && e.backends.length > 0
          ? <li class="fork"><b>choice</b><ul>{e.backends.map((b) => (
              <li class={b.takes ? "takes" : ""}><State level={b.takes ? 0 : levelOf(b.state)}>{b.state}</State> <code>{b.address}</code> <small>weight {b.weight}, group {b.group}</small></li>))}</ul></li>
          : <li class={"stop level" + level}><b>{e.verdict}</b></li>}
      </ol>
    </article>
  );
}
