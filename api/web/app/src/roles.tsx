// What this host is beside services: proxies, captures, announcements, pods.
import { useEffect, useState } from "preact/hooks";
import type { ComponentChildren } from "preact";
import { type Parts, get } from "./api";
import { State } from "./parts";

export function PartsView() {
  const [parts, setParts] = useState<Parts | null>(null);
  const [error, setError] = useState("");
  useEffect(() => {
    const stop = new AbortController();
    const ask = () => get<Parts>("/v1/page/parts", stop.signal).then((p) => { setParts(p); setError(""); }, (e: Error) => stop.signal.aborted || setError(e.message));
    void ask();
    const timer = setInterval(ask, 2000);
    return () => { stop.abort(); clearInterval(timer); };
  }, []);
  if (!parts) return <p class="none">{error || "asking"}</p>;
  const vips = parts.announcements.vips ?? [];
  const tables = [
    <Table name="Captures" head={["Name", "Mode", "Whose", "Where", "To", "When it is away"]}
      rows={(parts.captures ?? []).map((c) => [c.name, c.mode, c.whose, `${c.protocol.join(", ")}: ${c.where}`, c.proxy ? `${c.proxy} (${(c.to ?? []).join(", ")})` : (c.to ?? []).join(", "), c.onProxyDown])} />,
    <Table name="Proxies" head={["Name", "Protocol", "Listens at", "Open", "Connections", "Failed"]}
      rows={(parts.proxies ?? []).map((p) => [p.name, p.protocol.join(", "), p.missing?.length ? <State level={2}>not at {p.missing.join(", ")}</State> : p.listen.join(", "), p.open, p.connections, p.failed])} />,
    <Table name="Forwards" head={["Name", "From", "To", "By", "State", "Open"]}
      rows={(parts.forwards ?? []).map((f) => [f.name, f.listen ?? "remote " + f.remote, f.to, f.via.join(", "), f.up ? <State level={0}>up</State> : <State level={2}>down {f.why}</State>, f.open])} />,
    <Table name="Announced addresses" head={["Address", "Services", "To whom", "On the segment"]}
      rows={vips.map((v) => [v.address, v.services.join(", "), v.missing ? <State level={1}>{v.missing}</State> : (v.to ?? []).join(", ") || "nobody", v.l2 ? (v.l2.problem ? <State level={2}>{v.l2.problem}</State> : v.l2.here ? "here" : v.l2.owner ?? "nobody") : "–"])} />,
    <Table name="Routers" head={["Address", "AS", "State", "Prefixes", "BFD"]}
      rows={(parts.announcements.peers ?? []).map((p) => [p.address, p.as, p.established ? <State level={0}>established</State> : <State level={2}>{p.state} {p.why}</State>, p.prefixes, p.bfd?.state ?? "–"])} />,
    <Table name="Blocks of pod addresses" head={["Block", "Host", "Used", "State"]}
      rows={(parts.blocks ?? []).map((b) => [b.prefixes.join(", "), b.host + (b.own ? " (this one)" : ""), b.used ?? "–", b.draining ? "draining" : "open"])} />,
    <Table name="Pods" head={["Pod", "Addresses", "Device", "MTU"]}
      rows={(parts.pods ?? []).map((p) => [p.pod || "–", p.addresses.join(", "), p.device, p.mtu])} />,
  ];
  const empty = [parts.captures, parts.proxies, parts.forwards, vips, parts.announcements.peers, parts.blocks, parts.pods].every((x) => !x?.length);
  return (
    <section aria-label="Roles">
      {(error ? [error] : parts.errors).map((e) => <p role="alert"><State level={2}>cannot be read</State> {e}</p>)}
      {empty && <p class="none">This host does nothing beside its services: its configuration has no captures, proxies, forwards, announcements or pods.</p>}
      {tables}
    </section>
  );
}

function Table({ name, head, rows }: { name: string; head: string[]; rows: ComponentChildren[][] }) {
  if (rows.length === 0) return null;
  return (
    <div class="table">
      <h2>{name}</h2>
      <table>
        <thead><tr>{head.map((h) => <th scope="col">{h}</th>)}</tr></thead>
        <tbody>{rows.map((r) => <tr>{r.map((c) => <td>{c}</td>)}</tr>)}</tbody>
      </table>
    </div>
  );
}
